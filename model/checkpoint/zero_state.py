"""A rank's part of the optimizer's state at any ZeRO stage: flat views by parameter and range.

In: a training engine. Out: fp32 master weights and Adam's two moments as views of the engine's own memory, to read or
to write; the counters of Adam's steps; and, after writing, the model's own weights made from the masters again.

Only this module knows where DeepSpeed keeps them: stage 0 in the parameters and torch's optimizer; stages 1 and 2 in
one flat partition a group, mapped to parameters by `param._hp_mapping`; stage 3 in flat sub-groups of each parameter's
own partition (`grad_position`). Offloading the optimizer or the parameters changes none of this.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.checkpoint.manifest import Range
from model.training.parameter_groups import whole_shape
from storage.errors import UserError

if TYPE_CHECKING:
    from model.training.engine import TrainingEngine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """A range of a parameter and, for each of `PARTS`, its elements: fp32 [numel], a view of the engine's memory."""

    range: Range
    parts: Mapping[str, Tensor]

    def share(self, number: int, of: int) -> Fragment:
        """The `number`-th of `of` almost equal pieces."""
        name, start, numel = self.range
        first, last = numel * number // of, numel * (number + 1) // of
        parts = {part: tensor[first:last] for part, tensor in self.parts.items()}
        return Fragment(Range(name, start + first, last - first), parts)


def fragments_of(engine: TrainingEngine) -> list[Fragment]:
    """This rank's part, in the order of the parameters; at stage 0 every rank holds all.

    Adam's state is created, as zeros, where it has taken no step yet. Raises UserError where it is on NVMe.
    """
    _check_in_memory(engine)
    adam = _adam(engine)
    for group, _, flat in _flats(engine):
        if not (state := adam.state[flat]):
            settings = adam.param_groups[group]
            on_device = settings.get("fused") or settings.get("capturable")
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
            state |= {moment: torch.zeros_like(flat, memory_format=torch.preserve_format) for moment in MOMENTS}
    fragments = []
    for name, parameter in engine.model.named_parameters():
        if (place := _place(engine, parameter)) is None:
            continue
        flat, offset, start, numel = place
        whole = {WEIGHT: flat, **{moment: adam.state[flat][moment] for moment in MOMENTS}}
        parts = {part: tensor.detach().view(-1).narrow(0, offset, numel) for part, tensor in whole.items()}
        fragments.append(Fragment(Range(name, start, numel), parts))
    return fragments


def parameters(engine: TrainingEngine) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and optimizer group of every parameter."""
    groups = {id(parameter): group for group, members, _ in _flats(engine) for parameter in members}
    named = engine.model.named_parameters()
    return {name: (tuple(whole_shape(parameter)), groups[id(parameter)]) for name, parameter in named}


def adam_steps(engine: TrainingEngine) -> tuple[int, ...]:
    """Updates that Adam has made, by group. Call after `fragments_of`."""
    adam = _adam(engine)
    steps = {group: int(adam.state[flat]["step"]) for group, _, flat in _flats(engine)}
    return tuple(steps[group] for group in sorted(steps))


def set_adam_steps(engine: TrainingEngine, steps: Mapping[int, int]) -> None:
    """Set the updates that Adam has made, by group, in the counter of each flat tensor."""
    adam = _adam(engine)
    for group, _, flat in _flats(engine):
        adam.state[flat]["step"].fill_(steps[group])


def refresh(engine: TrainingEngine) -> None:
    """Make the model's weights from the master weights, on every rank. Collective."""
    optimizer, stage = engine.deepspeed.optimizer, engine.settings.zero
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()


def _adam(engine: TrainingEngine) -> torch.optim.Optimizer:
    optimizer = engine.deepspeed.optimizer
    adam: torch.optim.Optimizer = optimizer.optimizer if engine.settings.zero else optimizer
    return adam


def _flats(engine: TrainingEngine) -> Iterator[tuple[int, Sequence[nn.Parameter], Tensor]]:
    """The tensors that torch's optimizer steps, each with its group and the parameters that it holds parts of."""
    optimizer, stage = engine.deepspeed.optimizer, engine.settings.zero
    if stage == 0:
        for number, group in enumerate(optimizer.param_groups):
            yield from ((number, [parameter], parameter) for parameter in group["params"])
    elif stage == 3:
        groups = optimizer.sub_group_to_group_id
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield groups[number], optimizer.fp16_groups[number], flat
    elif hasattr(optimizer, "bf16_groups"):  # stage 1 in bf16
        yield from zip(itertools.count(), optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    else:
        yield from zip(itertools.count(), optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)


def _place(engine: TrainingEngine, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
    """The flat tensor with part of a parameter, the offset in it, and the part's start and numel; None: no part."""
    optimizer: Any = engine.deepspeed.optimizer
    whole: Any = parameter
    if engine.settings.zero == 0:
        return parameter, 0, 0, parameter.numel()
    if engine.settings.zero < 3:
        mapping = whole._hp_mapping
        if mapping is None:
            return None
        flat = [flat for _, _, flat in _flats(engine)][mapping.param_group_index]
        address = mapping.lp_fragment_address
        return flat, mapping.hp_fragment_address.start, address.start, address.numel
    sub_group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = engine.mesh.rank * partition
    numel = min(partition, whole.ds_numel - start)  # the last partitions are padded, or padding alone
    return (optimizer.fp32_partitioned_groups_flat[sub_group], offset, start, numel) if numel > 0 else None


def _check_in_memory(engine: TrainingEngine) -> None:
    optimizer = engine.deepspeed.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise UserError("checkpoints need the optimizer's state in memory: offload it to cpu, not to nvme")
    if getattr(optimizer, "offload_optimizer", False) and getattr(optimizer, "partial_offload", 1.0) != 1.0:
        raise UserError("checkpoints need all of the optimizer's state in one place: leave out offload_optimizer.ratio")
    if getattr(optimizer, "round_robin_gradients", False):
        raise UserError("checkpoints need parameters in their own order: leave out round_robin_gradients")
