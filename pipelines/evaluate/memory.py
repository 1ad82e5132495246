"""What the evaluation of a recipe takes of its workers' devices, and on how many the contexts fit.

In: a recipe, and a device's memory, if the evaluation is to fit it. Out: one `CellMemory` a task and context. Nothing
is allocated or run: the numbers are of `model.memory_estimate`, for the recipe's model with its weights whole on each
worker, as evaluation has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import LlamaConfig

from model.inference.scaled_numbers import CacheFormat
from model.llama.config import llama_config
from model.llama.loss import CHUNK
from model.memory_estimate.inference import (
    InferenceMemory,
    InferenceSettings,
    least_ranks,
    plan_inference,
)
from model.memory_estimate.plan import parameter_counts
from model.memory_estimate.scoring import scoring_bytes
from pipelines.recipe import Recipe
from pipelines.train.memory_advice import GIB, vocabulary_sizes
from storage.errors import UserError

ANSWER = 128
"""Tokens of a question and its answer, about."""
SCORED_TILE = 4096
"""Tokens that scoring takes at once, but for the attention."""


@dataclass(frozen=True)
class CellMemory:
    """What cells of a task take of each of `workers`, at one context.

    fits: None where no device was given. needs: the fewest workers that it fits, of a task that does not; None where
    none are needed or none suffice.
    """

    task: str
    context: int
    workers: int
    memory: InferenceMemory
    fits: bool | None = None
    needs: int | None = None


@dataclass(frozen=True)
class Answering:
    """On how many devices a context is answered, and bytes on each; None where no number of them suffices.

    cache: None is bf16. split: whether the weights are shared out too.
    """

    context: int
    cache: CacheFormat | None
    split: bool
    least: tuple[int, int] | None


def evaluation_memory(recipe: Recipe, device_bytes: int | None = None) -> list[CellMemory]:
    """Held-out loss at the context of every train stage, and each task that has contexts of its own."""
    config, workers = _config(recipe), recipe.evaluate.sp
    found = []
    for task, context in _contexts(recipe):
        cell = CellMemory(task, context, workers, _memory(recipe, config, task, context, workers))
        if device_bytes is not None:
            fits, needs = cell.memory.peak <= device_bytes, None
            if not fits:
                counts = (1 << power for power in range(11))
                needs = next(
                    (n for n in counts if _memory(recipe, config, task, context, n).peak <= device_bytes), None
                )
            cell = replace(cell, fits=fits, needs=needs)
        found.append(cell)
    return found


def answering(recipe: Recipe, device_bytes: int) -> list[Answering]:
    """On how many GPUs each context of the recipe is answered in bf16, by how cache and weights are kept."""
    config, found = _config(recipe), []
    for context in sorted({context for _, context in _contexts(recipe)}):
        for split in (False, True):
            for cache in _CACHES:
                settings = InferenceSettings(context, new_tokens=ANSWER, cache=cache, split=split)
                least = least_ranks(config, settings, device_bytes, on_cuda=True)
                found.append(Answering(context, cache, split, least and (least[0], least[1].peak)))
    return found


_CACHES: tuple[CacheFormat | None, ...] = (None, "int8")


def check_evaluation(recipe: Recipe) -> None:
    """Raise UserError where a cell does not fit `evaluate.device_memory`."""
    if (given := recipe.evaluate.device_memory) is None:
        return
    too_large = [cell for cell in evaluation_memory(recipe, int(given * GIB)) if not cell.fits]
    if too_large:
        cell = max(too_large, key=lambda cell: cell.memory.peak)
        remedy = f"set evaluate.sp to {cell.needs}" if cell.needs else "take larger devices"
        raise UserError(
            f"evaluate: {cell.task} at {cell.context} tokens takes {cell.memory.peak / GIB:.1f} GiB of a device with "
            f"evaluate.sp {cell.workers}, more than evaluate.device_memory {given:g}; {remedy} or leave that context "
            f"out"
        )


def _config(recipe: Recipe) -> LlamaConfig:
    last = recipe.curriculum[-1]
    return llama_config(recipe.model.size, vocabulary_sizes(recipe), last.context, last.rope_theta)


def _contexts(recipe: Recipe) -> Iterator[tuple[str, int]]:
    for context in sorted({stage.context for stage in recipe.curriculum}):
        yield "heldout", context
    for key in type(recipe.evaluate).model_fields:
        for context in getattr(getattr(recipe.evaluate, key), "contexts", ()):
            yield key.replace("_", "-"), context


def _memory(recipe: Recipe, config: LlamaConfig, task: str, context: int, workers: int) -> InferenceMemory:
    on_gpu = recipe.evaluate.resources.gpus > 0
    itemsize = 2 if on_gpu and recipe.training.precision == "bf16" else 4
    if task != "heldout":
        settings = InferenceSettings(context, workers, new_tokens=ANSWER, itemsize=itemsize)
        return plan_inference(config, settings, on_gpu)
    tokens = -(-context // workers)
    scored = scoring_bytes(config, itemsize, tokens, workers, on_gpu, min(SCORED_TILE, tokens), min(CHUNK, tokens))
    return InferenceMemory({"weights": itemsize * parameter_counts(config)[0], "the scored sequence": scored})
