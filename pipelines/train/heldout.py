"""Held-out loss while a stage trains: the same sequences every time, by all ranks, through the engine as it is sharded.

In: the stage's held-out shards, its engine between two steps. Out: `Measured`, the same on every rank; nothing of the
training changes, not a gradient, a random state or the loader's place. The best checkpoint is the committed one of
least loss, a plain JSON that checkpoints carry.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.training.engine import LossMetrics, TrainingEngine
from model.training.rank_batch import Dispatcher, RankBatch
from pipelines.recipe.train import HeldoutWhileTraining
from pipelines.train.job import TrainJob
from pipelines.train.samples import Sampler
from tokenization.loader.join import join_sequences
from tokenization.media.frame_sampling import uniform_sample
from tokenization.shards.chosen_sequences import read_sequences
from tokenization.shards.index import ShardSet

log = logging.getLogger("ringworld")

Best = Mapping[str, Any]
"""A checkpoint's `step`, its held-out `loss`, and the `targets` that this is a loss of."""


@dataclass(frozen=True)
class Measured:
    """One measurement. line: what `metrics/` keeps of it; samples are on rank 0 alone. seconds: what it took."""

    loss: float
    targets: int
    line: Mapping[str, Any]
    seconds: float


class Heldout:
    """The held-out sequences of a stage on this rank. Its making and `measure` are collective.

    dispatcher: the stage's, which makes this rank's share of a micro-batch. Each data-parallel rank has every dp-th
    sequence, and as many as the others: what does not go round is filled with sequences that count for nothing.
    """

    def __init__(
        self, settings: HeldoutWhileTraining, job: TrainJob, engine: TrainingEngine, dispatcher: Dispatcher
    ) -> None:
        self._settings, self._job, self._engine = settings, job, engine
        self._last = job.stage.steps
        sets = dict(heldout_sets(job))
        self.sources = tuple(sets)
        self._batches: list[RankBatch] = []
        mesh, own = engine.mesh, dataclasses.replace(dispatcher, n_sources=len(sets))

        def read() -> int:
            """Read this rank's sequences; how many examples it shares with the other ranks of its sequences."""
            examples, self._batches = self._read(sets, own)
            return examples if mesh.sp_rank == 0 else 0

        self._n_examples = sum(mesh.on_all_ranks(read))
        if mesh.rank == 0 and not sets:
            log.warning(
                "train-%s: nothing is held out of its sources, so train.heldout is not measured", job.stage.name
            )
        self._sampler: Sampler | None = None
        if sets and settings.sample_tokens and engine.settings.zero == 3:
            if mesh.rank == 0:
                log.info("train-%s: no samples are drawn at ZeRO 3, where no worker has all weights", job.stage.name)
        elif sets and settings.sample_tokens:
            self._sampler = Sampler(job, sets, settings.sample_tokens)

    def is_due(self, step: int) -> bool:
        """Whether it is to be measured when so many steps are done."""
        return bool(self.sources) and (step % self._settings.steps == 0 or step == self._last)

    def measure(self) -> Measured:
        """The loss of all sequences at the present weights, and samples."""
        started, engine = time.perf_counter(), self._engine
        metrics = engine.eval_step(self._batches, max(1, self._n_examples))
        line = heldout_line(metrics, self.sources)
        sampler = self._sampler
        if sampler is not None:
            drawn = engine.mesh.on_rank_zero(lambda: sampler.draw(engine.model, engine.step))
            line["samples"] = drawn
        targets = sum(one.targets for one in metrics.modalities.values())
        return Measured(metrics.loss, targets, line, time.perf_counter() - started)

    def _read(self, sets: Mapping[str, ShardSet], dispatcher: Dispatcher) -> tuple[int, list[RankBatch]]:
        chosen = [
            (source, number)
            for source, shard_set in sets.items()
            for number in uniform_sample(len(shard_set), self._settings.max_sequences).tolist()
        ]
        mesh, names = self._engine.mesh, list(sets)
        mine = range(mesh.dp_rank, -(-len(chosen) // mesh.dp) * mesh.dp, mesh.dp)
        examples, batches = 0, []
        for place in mine:
            source, number = chosen[place % len(chosen)]
            (sequence,) = read_sequences(self._job.shards, sets[source], [number])
            batch = dispatcher(join_sequences([sequence], [names.index(source)]))
            if place < len(chosen):
                examples += sequence.n_examples
            else:
                batch = _without_targets(batch)
            batches.append(batch)
            mesh.on_progress(False)
        return examples, batches


def heldout_sets(job: TrainJob) -> Iterator[tuple[str, ShardSet]]:
    """The stage's held-out shards by source, of those sources that have any."""
    for source in sorted(job.stage.mixture):
        shard_set = job.packed.read_set(job.shards, source, "heldout")
        if shard_set is not None and len(shard_set):
            yield source, shard_set


def heldout_line(metrics: LossMetrics, sources: tuple[str, ...]) -> dict[str, Any]:
    """A measurement as `metrics/` keeps it, plain JSON.

    loss: as a step's. NAME_nats, NAME_targets: sums of each modality. sources: nats_per_token and targets by name.
    """
    line: dict[str, Any] = {"loss": metrics.loss}
    for name, one in metrics.modalities.items():
        line |= {f"{name}_nats": one.nats, f"{name}_targets": one.targets}
    line["sources"] = {
        source: {"targets": one.targets} | ({"nats_per_token": one.nats / one.targets} if one.targets else {})
        for source, one in zip(sources, metrics.sources, strict=True)
    }
    return line


def better(best: Best | None, step: int, measured: Measured) -> Best | None:
    """The best checkpoint when that of `step` is committed. A loss of other targets is not compared with."""
    if not math.isfinite(measured.loss):
        return best
    if best is None or best["targets"] != measured.targets or measured.loss < best["loss"]:
        return {"step": step, "loss": measured.loss, "targets": measured.targets}
    return best


def _without_targets(batch: RankBatch) -> RankBatch:
    """The same tokens, which count for nothing."""
    return dataclasses.replace(
        batch,
        loss_weight=torch.zeros_like(batch.loss_weight),
        source=torch.full_like(batch.source, -1),
        useful_tokens=0,
        useful_pairs=0.0,
    )
