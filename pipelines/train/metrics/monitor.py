"""What is watched of a train stage: each step's figures are made here and go to every place that shows or keeps them.

In: what the engine measured of a step, and the worker's own waiting and saving. Out, on rank 0: Ray's metrics and the
terminal's bar at once; the files in the stage's folder and Weights & Biases with the next checkpoint. Where the slowest
rank decides (seconds by part, memory) the figure is the largest over all ranks, by one small collective a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from model.step_timer import StepClock
from model.training.engine import StepMetrics, TrainingEngine
from model.training.rank_batch import RankBatch
from pipelines.cluster.progress import Meter
from pipelines.train.data import source_names
from pipelines.train.job import TrainJob
from pipelines.train.metrics.files import write_events
from pipelines.train.metrics.machine import PARTS, device_peak, memory, part_figures, speed
from pipelines.train.metrics.profiler import Profile
from pipelines.train.metrics.steps import (
    HeldSteps,
    Publisher,
    heldout_figures,
    step_figures,
    step_line,
    write_metrics,
)
from pipelines.train.metrics.wandb import WeightsAndBiases
from tokenization.loader.batch import Batch
from tokenization.loader.loader import State

_BESIDE_THE_BAR = ("loss", "heldout_loss", "tokens_per_second", "mfu", "loader_stall_seconds")


class Monitor:
    """Of one rank. `next` and `step` go around each step, `take` before each checkpoint; `step` is collective.

    watch: the actor `pipelines.cluster.heartbeat.Watch`, which moves the terminal's bar.
    """

    def __init__(self, job: TrainJob, engine: TrainingEngine, watch: Any) -> None:
        self._engine, self._watch, self._is_first = engine, watch, engine.mesh.rank == 0
        self._clock = StepClock()
        self._sources = source_names(job)
        peak = device_peak(job.recipe.training.hardware.peak_flops)
        self._peak = peak and peak * engine.mesh.world_size
        self._profile = Profile(job, engine.mesh.rank)
        self._meter = Meter(f"train-{job.stage.name}")
        self._wandb = WeightsAndBiases(job) if self._is_first and job.recipe.training.wandb is not None else None
        publishers: list[Publisher] = [lambda steps: write_metrics(job.store, [step.line for step in steps])]
        if job.recipe.training.tensorboard:
            publishers.append(partial(write_events, job.store))
        if self._wandb is not None:
            publishers.append(self._wandb.publish)
        self._held = HeldSteps(publishers)
        self._heldout: dict[str, float] = {}  # the last held-out loss, which the bar goes on showing

    def next(self, batches: Iterator[tuple[Batch[RankBatch], State]]) -> tuple[Batch[RankBatch], State]:
        """The next batch; how long it was waited for is the loader's stall."""
        self._profile.before(self._engine.step)
        with self._clock.part("load"):
            return next(batches)

    def step(self, metrics: StepMetrics, more: Mapping[str, Any]) -> None:
        """Show and hold a step that was made. more: further keys of its line in `metrics/`. Collective."""
        self._profile.after(self._engine.step)
        seconds = {**self._clock.read(), **self._engine.clock.read()}
        held = memory()
        largest = self._engine.mesh.largest([seconds.get(part, 0.0) for part in PARTS] + list(held.values()))
        if not self._is_first:
            return
        machine = {
            **speed(metrics, seconds["load"] + metrics.seconds, self._engine.model.config, self._peak),
            **part_figures(dict(zip(PARTS, largest))),
            **dict(zip(held, largest[len(PARTS) :])),
        }
        line = {**step_line(metrics, self._sources, machine), **more}
        figures = step_figures(line)
        self._show(figures)
        move_bar(self._watch, line, {**self._heldout, **figures})
        self._held.add(line, figures)

    def heldout(self, line: Mapping[str, Any], seconds: float) -> None:
        """Show and hold what was measured after the step that was made last. line: of `pipelines.train.heldout`."""
        self._engine.clock.read()  # its waits are no part of the next step
        if not self._is_first:
            return
        figures = {**heldout_figures(line), "heldout_seconds": seconds}
        self._show(figures)
        self._heldout = {"heldout_loss": line["loss"]}
        self._held.amend(line, seconds)

    def _show(self, figures: Mapping[str, float]) -> None:
        """As gauges, those of a source with the source as a tag."""
        for name, value in figures.items():
            _, *of_source = name.split("/")
            if of_source:
                source, figure = of_source
                self._meter.set(source, **{f"source_{figure}": value})
            else:
                self._meter.set(**{name: value})

    def take(self) -> Callable[[float], None]:
        """The steps since the last time, of which a checkpoint begins: what is returned publishes them."""
        return self._held.take()

    def discard(self) -> None:
        """The engine went back to a checkpoint: forget the steps after it, where they are not published yet."""
        self._clock.read()
        self._engine.clock.read()
        self._held.discard()

    def close(self) -> None:
        """The stage is over."""
        self._profile.close()
        if self._wandb is not None:
            self._wandb.close()


def move_bar(watch: Any, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Report the step to the terminal that runs the recipe."""
    shown = {name: figures[name] for name in _BESIDE_THE_BAR if name in figures}
    watch.report.remote(line["step"] + 1, shown)
