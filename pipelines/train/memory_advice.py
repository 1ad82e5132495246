"""What each train stage of a recipe will take of its workers' memory, and the cheapest settings that fit a device.

In: a recipe, and a device's memory, if the stages are to fit it. Out: one `StageMemory` a train stage. Nothing is
allocated or run: `model.memory_estimate.plan` has the numbers, for the engine settings of the stage, on the fewest
workers that it may get, with each sequence one document, which takes most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any, get_args

import numpy as np

from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from model.layers.memory_settings import Activations, MemorySettings
from model.llama.config import llama_config
from model.memory_estimate.plan import MemoryPlan, plan_memory
from model.training.rank_batch import attention_shape
from pipelines.recipe import Recipe, Train, TrainStage
from pipelines.tokenize.vocabulary import joint_vocabulary
from pipelines.train.engine_setup import engine_settings
from pipelines.train.group_size import group_sizes

log = logging.getLogger("ringworld")

GIB = 2**30
LLAMA2_TEXT = 32_000
MLP_TILE = 4096
_LADDER: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True)
class StageMemory:
    """A stage's memory on each of `workers`.

    fits: None where no device was given. advice: changed settings that fit, by recipe key, and what they take; None
    where none are needed or nothing fits. on_gpu: whether the device has memory of its own.
    """

    name: str
    workers: int
    memory: MemoryPlan
    on_gpu: bool
    fits: bool | None = None
    advice: tuple[dict[str, Any], MemoryPlan] | None = None

    def host_bytes(self, memory: MemoryPlan) -> int:
        """A node's memory that each of its workers takes, beside the worker's process itself."""
        return memory.host_peak + (0 if self.on_gpu else memory.peak)


def recipe_memory(recipe: Recipe, device_bytes: int | None = None) -> list[StageMemory]:
    """The memory of every train stage; with device_bytes also whether it fits, and the cheapest settings that do."""
    sizes = vocabulary_sizes(recipe)
    return [_stage_memory(recipe, stage, sizes, device_bytes) for stage in recipe.curriculum]


def _stage_memory(
    recipe: Recipe, stage: TrainStage, vocabulary: Mapping[str, int], device_bytes: int | None
) -> StageMemory:
    train, workers = recipe.training, min(group_sizes(recipe.training, stage))
    config = llama_config(recipe.model.size, vocabulary, stage.context, stage.rope_theta)
    shape, on_gpu = attention_shape(config, train.precision), train.resources.gpus > 0

    @cache
    def sequence_plan(sp: int) -> SequencePlan:
        bounds, choices = np.arange(stage.rows + 1) * stage.context, asdict(train.for_stage(stage).attention)
        return plan_sequence(bounds, sp, shape=shape, hardware=train.hardware, **choices)

    def predicted(changed: TrainStage) -> MemoryPlan:
        settings = engine_settings(train, changed, workers // changed.sp)
        return plan_memory(config, settings, sequence_plan(changed.sp), workers, on_cuda=on_gpu)

    memory = predicted(stage)
    found = StageMemory(f"train-{stage.name}", workers, memory, on_gpu)
    if device_bytes is None:
        return found
    if memory.peak <= device_bytes:
        return replace(found, fits=True)
    for changed in _by_cost(train, stage, workers):
        if (other := predicted(changed)).peak <= device_bytes:
            return replace(found, fits=False, advice=(_changes(train, stage, changed), other))
    return replace(found, fits=False)


def _by_cost(train: Train, stage: TrainStage, workers: int) -> Iterator[TrainStage]:
    """The stage with less memory, the least cost in time first.

    Each saving counts more than all that are cheaper together: a wider group that holds the weights, a higher ZeRO
    stage, norms and MLP run again, a tiled MLP, all but the attention run again, the attention too, activations to the
    host, the optimizer's state, the weights, and twice the ranks to a sequence.
    """
    here = train.for_stage(stage)
    now, zero = here.memory, here.zero
    groups = _wider_groups(here.zero_group, math.gcd(workers, train.workers))
    either, variants = (False, True), []
    stages, rungs = range(max(zero, 1), 4), range(_LADDER.index(now.activations), 4)
    for wider, stage_up, rung, tiled, acts, optimizer, weights, doublings in product(
        range(len(groups)), stages, rungs, either, either, either, either, range(4)
    ):
        if (weights and stage_up < 3) or (weights and not optimizer) or (acts and rung < 2):
            continue
        memory = MemorySettings(
            activations=_LADDER[rung],
            mlp_tile=now.mlp_tile or (MLP_TILE if tiled else None),
            offload_activations=acts or now.offload_activations,
            offload_optimizer=optimizer or now.offload_optimizer,
            offload_parameters=weights or now.offload_parameters,
        )
        changed = stage.model_copy(
            update={
                "zero": stage_up,
                "zero_group": groups[wider],
                "sp": stage.sp << doublings,
                "memory": memory,
            }
        )
        if workers % changed.sp == 0 and stage.context * stage.rows % changed.sp == 0:
            cost = wider / len(groups) + stage_up - zero + (0, 4, 16, 32)[rung] + 8 * tiled
            cost += 64 * acts + 128 * optimizer + 256 * weights + 512 * doublings
            variants.append((cost, changed))
    for _, changed in sorted(variants, key=lambda variant: variant[0]):
        yield changed


def _wider_groups(group: int | None, widest: int) -> list[int | None]:
    """The group that holds all weights, then twice, four times ... as wide ones, as far as they divide the widest."""
    if group is None:
        return [None]
    doubled = [group << n for n in range((widest // group).bit_length()) if widest % (group << n) == 0]
    return [*doubled, *([] if widest in doubled else [widest])]


def _changes(train: Train, stage: TrainStage, changed: TrainStage) -> dict[str, Any]:
    """The keys of a stage that differ, as a recipe writes them."""
    before, after = train.for_stage(stage), train.for_stage(changed)
    changes: dict[str, Any] = {}
    if before.zero != after.zero:
        changes["zero"] = after.zero
    if before.zero_group != after.zero_group:
        changes["zero_group"] = after.zero_group
    if stage.sp != changed.sp:
        changes["sp"] = changed.sp
    if before.memory != after.memory:
        default = asdict(MemorySettings())
        changes["memory"] = {key: value for key, value in asdict(after.memory).items() if value != default[key]}
    return changes


def vocabulary_sizes(recipe: Recipe) -> dict[str, int]:
    """Ids by modality. Where the tokenizer cannot be read, as many text ids as LLaMA-2's."""
    try:
        return joint_vocabulary(recipe).sizes
    except Exception as error:  # of any kind: the store may not be reachable from here
        path, reason = recipe.text_tokenizer.path, type(error).__name__
        log.info("text_tokenizer %s cannot be read (%s): %d text ids are assumed", path, reason, LLAMA2_TEXT)
        vision = {} if recipe.vqgan is None else {"vision": recipe.vqgan.sizes.codebook_size + 256}
        return {"text": LLAMA2_TEXT, **vision}
