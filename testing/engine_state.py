"""All that an engine's optimizer holds, put together from all ranks by DeepSpeed's own means, to be compared."""

from __future__ import annotations

import torch

from model.training.engine import TrainingEngine
from model.training.master_weights import master_weight
from model.training.parameter_groups import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_gradient(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """A copy of the accumulated gradient by name, in fp32, on every rank. Collective."""
    from deepspeed.utils import safe_get_full_grad

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is offloaded may still be on its way to the host
    gradient = {}
    for name, parameter in engine.model.named_parameters():
        gradient[name] = safe_get_full_grad(parameter).reshape(whole_shape(parameter)).clone()
    return gradient


def whole_weights(engine: TrainingEngine) -> dict[str, torch.Tensor] | None:
    """All fp32 weights by name, on rank 0; None on other ranks."""
    weights = {name: master_weight(engine, weight).clone() for name, weight in engine.model.named_parameters()}
    return weights if engine.mesh.rank == 0 else None


def whole_state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """Master weights by name, and both moments of each by "name moment", on rank 0; nothing on other ranks."""
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors, optimizer = dict(whole_weights(engine) or {}), engine.deepspeed.optimizer
    if engine.settings.zero in (1, 2):  # DeepSpeed links before the second group has taken its first step
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        for moment in MOMENTS:
            if engine.settings.zero:
                state = safe_get_full_optimizer_state(parameter, moment)
            else:
                state = optimizer.state[parameter][moment]
            if engine.mesh.rank == 0:
                tensors[f"{name} {moment}"] = state.reshape(whole_shape(parameter)).clone()
    return tensors


def adam_counters(engine: TrainingEngine) -> set[int]:
    """The values of all of Adam's step counters on this rank."""
    optimizer = engine.deepspeed.optimizer
    adam = optimizer.optimizer if engine.settings.zero else optimizer
    return {int(state["step"]) for state in adam.state.values()}


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not equal to the bit."""
    assert ours.keys() == theirs.keys()
    return [name for name, x in theirs.items() if not torch.equal(ours[name], x)]
