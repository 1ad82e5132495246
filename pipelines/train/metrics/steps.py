"""The steps of a stage: one JSON line each, and the figures that people see, held back until the next checkpoint.

So a step which the stage goes back from is never published.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.train.job import METRICS
from storage.store import Store

if TYPE_CHECKING:
    from model.training.engine import StepMetrics


@dataclass(frozen=True)
class Step:
    """line: as `metrics/` keeps it. figures: the same for people, by `step_figures`. time: seconds since the epoch."""

    line: dict[str, Any]
    figures: dict[str, float]
    time: float


Publisher = Callable[[Sequence[Step]], None]
"""Called with the steps between two checkpoints, at least one, in order; the last has `checkpoint_seconds` too."""


class HeldSteps:
    """The steps since the last checkpoint, which wait for the next one."""

    def __init__(self, publishers: Sequence[Publisher]) -> None:
        self._publishers = publishers
        self._steps: list[Step] = []

    def add(self, line: dict[str, Any], figures: dict[str, float]) -> None:
        """Hold a step that was made just now."""
        self._steps.append(Step(line, figures, time.time()))

    def amend(self, heldout: Mapping[str, Any], seconds: float) -> None:
        """Add the held-out loss after the step that was added last, and the seconds that it took."""
        last = self._steps[-1]
        machine = {**last.line["machine"], "heldout_seconds": round(seconds, 4)}
        line = {**last.line, "heldout": dict(heldout), "machine": machine}
        self._steps[-1] = Step(line, step_figures(line), last.time)

    def discard(self) -> None:
        """Forget the steps since the last `take`; they will be done again."""
        self._steps = []

    def take(self) -> Callable[[float], None]:
        """Let go of the steps for a checkpoint that begins; what is returned publishes them.

        It is called in the checkpoint's thread, just before the commit, with the seconds that the checkpoint kept the
        training waiting; again where the checkpoint has to be written again.
        """
        taken, self._steps = self._steps, []

        def publish(checkpoint_seconds: float) -> None:
            if not taken:
                return
            cost, last = {"checkpoint_seconds": checkpoint_seconds}, taken[-1]
            steps = [*taken[:-1], Step(last.line | cost, last.figures | cost, last.time)]
            for publisher in self._publishers:
                publisher(steps)

        return publish


def read_metrics(store: Store) -> Iterator[dict[str, Any]]:
    """The committed steps of a train stage, in order."""
    for name in store.names(METRICS):
        with store.open(name) as file:
            yield from (json.loads(line) for line in file)


def write_metrics(store: Store, steps: list[dict[str, Any]]) -> None:
    """Commit the steps since the last checkpoint; a repeat after a kill writes the same name again."""
    with store.writing(f"{METRICS}/{steps[-1]['step'] + 1:08d}.jsonl") as file:
        for step in steps:
            file.write((json.dumps(step) + "\n").encode())


def step_line(metrics: StepMetrics, sources: Sequence[str], machine: Mapping[str, float]) -> dict[str, Any]:
    """A step as `metrics/` keeps it, plain JSON.

    The engine's figures, those of a modality as `NAME_loss`, `NAME_nats` and `NAME_targets`, the gradient's norm null
    where the step was dropped; `sources`: loss (they sum to the step's), nats_per_token and targets by name of the
    source; `machine`: what is not the same when a step is done again.
    """
    line = dataclasses.asdict(metrics)
    if not math.isfinite(metrics.grad_norm):
        line["grad_norm"] = None
    for name, figures in line.pop("modalities").items():
        line |= {f"{name}_{figure}": value for figure, value in figures.items()}
    line["sources"] = {
        source: {"loss": one.loss, "targets": one.targets}
        | ({"nats_per_token": one.nats / one.targets} if one.targets else {})
        for source, one in zip(sources, metrics.sources)
    }
    return {**line, "machine": dict(machine)}


def modalities(line: Mapping[str, Any]) -> list[str]:
    """The modalities that a line of `metrics/` has figures of, by name, in the order of the joint vocabulary."""
    return [name.removesuffix("_targets") for name in line if name.endswith("_targets")]


def step_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a step that people see, by flat names; those of a source are `source/<name>/<figure>`."""
    figures = {name: line[name] for name in ("loss", "lr", "grad_norm") if line[name] is not None}
    for modality in modalities(line):
        if targets := line[f"{modality}_targets"]:
            figures[f"{modality}_loss"] = line[f"{modality}_loss"]
            figures[f"{modality}_nats_per_token"] = line[f"{modality}_nats"] / targets
    for source, values in line["sources"].items():
        figures |= {f"source/{source}/{name}": value for name, value in values.items()}
    figures |= heldout_figures(line["heldout"]) if "heldout" in line else {}
    optional = ("lost_sequences", "lost_tokens", "checkpoint_seconds")
    return {**figures, **line["machine"], **{name: line[name] for name in optional if name in line}}


def heldout_figures(heldout: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a measurement of held-out loss, under `heldout` in a step's line, by flat names as a step's."""
    figures = {"heldout_loss": heldout["loss"]}
    for modality in modalities(heldout):
        if targets := heldout[f"{modality}_targets"]:
            figures[f"heldout_{modality}_nats_per_token"] = heldout[f"{modality}_nats"] / targets
    for source, values in heldout["sources"].items():
        if "nats_per_token" in values:
            figures[f"source/{source}/heldout_nats_per_token"] = values["nats_per_token"]
    return figures


def step_seconds(step: Mapping[str, Any]) -> float:
    """Of a step, a line of `metrics/`, on rank 0, with the wait for its batch, which lines of older runs leave out."""
    return float(step["machine"].get("step_seconds", step["seconds"]))


def whole_seconds(step: Mapping[str, Any]) -> float:
    """The same with the measurement of held-out loss and the checkpoint after it, where there were any."""
    after = step["machine"].get("heldout_seconds", 0.0) + step.get("checkpoint_seconds", 0.0)
    return float(step_seconds(step) + after)


def tokens_per_second(steps: Sequence[Mapping[str, Any]]) -> float:
    """Over the `whole_seconds` of these steps; starts, restarts and the steps they do again are not among them."""
    return sum(step["tokens"] for step in steps) / max(sum(map(whole_seconds, steps)), 1e-9)
