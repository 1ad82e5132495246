"""One door for all that is watched of a train stage: each step's figures are made here and fed to every sink.

In: what the engine measured of a step, and the worker's own waiting and saving. Out: the sinks of rank 0. Where the
slowest rank decides (seconds by part, memory) the figure is the largest over all ranks, by one small collective a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from model.step_timer import StepClock
from model.training.engine import StepMetrics, TrainingEngine
from model.training.rank_batch import RankBatch
from pipelines.train.data import source_names
from pipelines.train.job import TrainJob
from pipelines.train.metrics.files import MetricsFile, TensorBoard
from pipelines.train.metrics.machine import PARTS, device_peak, memory, part_figures, speed
from pipelines.train.metrics.profiler import Profile
from pipelines.train.metrics.sink import Publish, RayMetrics, Sink, Terminal
from pipelines.train.metrics.steps import step_figures, step_line
from pipelines.train.metrics.wandb import WeightsAndBiases
from tokenization.loader.batch import Batch
from tokenization.loader.loader import State


class Monitor:
    """Of one rank. `next` and `step` go around each step, `take` before each checkpoint; `step` is collective."""

    def __init__(self, job: TrainJob, engine: TrainingEngine, reports: Any) -> None:
        self._job, self._engine = job, engine
        self._clock = StepClock()
        self._sources = source_names(job)
        peak = device_peak(job.recipe.train.hardware.peak_flops)
        self._peak = peak and peak * engine.mesh.world_size
        self._profile = Profile(job, engine.mesh.rank)
        self._sinks: list[Sink] = []
        if engine.mesh.rank == 0:
            self._sinks = _sinks(job, reports)

    def next(self, batches: Iterator[tuple[Batch[RankBatch], State]]) -> tuple[Batch[RankBatch], State]:
        """The next batch; how long it was waited for is the loader's stall."""
        self._profile.before(self._engine.step)
        with self._clock.part("load"):
            return next(batches)

    def step(self, metrics: StepMetrics, more: Mapping[str, Any]) -> None:
        """Feed a step that was made to the sinks. more: further keys of its line in `metrics/`. Collective."""
        self._profile.after(self._engine.step)
        seconds = {**self._clock.read(), **self._engine.clock.read()}
        held = memory()
        largest = self._engine.mesh.largest([seconds.get(part, 0.0) for part in PARTS] + list(held.values()))
        if not self._sinks:
            return
        machine = {
            **speed(metrics, seconds["load"] + metrics.seconds, self._engine.model.config, self._peak),
            **part_figures(dict(zip(PARTS, largest))),
            **dict(zip(held, largest[len(PARTS) :])),
        }
        line = {**step_line(metrics, self._sources, machine), **more}
        for sink in self._sinks:
            sink.step(line, step_figures(line))

    def take(self) -> Publish:
        """The steps since the last time, of which a checkpoint begins: what is returned publishes them in all sinks."""
        taken = [sink.take() for sink in self._sinks]

        def publish(checkpoint_seconds: float) -> None:
            for one in taken:
                one(checkpoint_seconds)

        return publish

    def discard(self) -> None:
        """The engine went back to a checkpoint: forget the steps after it, where they are not out yet."""
        self._clock.read()
        self._engine.clock.read()
        for sink in self._sinks:
            sink.discard()

    def close(self) -> None:
        """The stage is over."""
        self._profile.close()
        for sink in self._sinks:
            sink.close()


def _sinks(job: TrainJob, reports: Any) -> list[Sink]:
    sinks: list[Sink] = [MetricsFile(job.store), RayMetrics(f"train-{job.stage.name}"), Terminal(reports)]
    if job.recipe.train.tensorboard:
        sinks.append(TensorBoard(job.store))
    if job.recipe.train.wandb is not None:
        sinks.append(WeightsAndBiases(job))
    return sinks
