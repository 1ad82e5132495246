"""What `Monitor` asks of a sink, two ways to answer, and the sinks that show a step at once: Ray's metrics, the bar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pipelines.cluster.progress import Meter

SHOWN = ("loss", "tokens_per_second", "mfu", "loader_stall_seconds")
"""Figures beside the terminal's bar."""


Publish = Callable[[float], None]
"""Called in the checkpoint's thread just before it counts, with the seconds that it kept the training waiting; again
where the checkpoint has to be written again."""


class Sink(Protocol):
    """Takes every step once, in order, but for those that are done again after a restart."""

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """line: the step as `metrics/` keeps it. figures: the same for people, by `metrics.step_figures`."""

    def take(self) -> Publish:
        """Let go of the steps since the last time, of which a checkpoint begins; what is returned publishes them."""

    def discard(self) -> None:
        """Forget the steps since the last `take`; they will be done again."""

    def close(self) -> None:
        """There are no further steps."""


class Shown:
    """A sink that keeps nothing: what it was told is out."""

    def take(self) -> Publish:
        """Nothing is left to publish."""
        return lambda checkpoint_seconds: None

    def discard(self) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        """Nothing is open."""


class Held(ABC):
    """A sink whose steps wait for the checkpoint after them, so that one the stage goes back from is never out.

    `_pending` is what `step` made of them, in order.
    """

    def __init__(self) -> None:
        self._pending: list[Any] = []

    def take(self) -> Publish:
        """What is pending, to be published with the checkpoint."""
        taken, self._pending = self._pending, []

        def publish(checkpoint_seconds: float) -> None:
            if taken:
                self._publish(taken, checkpoint_seconds)

        return publish

    @abstractmethod
    def _publish(self, taken: list[Any], checkpoint_seconds: float) -> None:
        """Let these steps out, one at least; the last of them says what the checkpoint cost."""

    def discard(self) -> None:
        """Forget what is pending."""
        self._pending = []


class RayMetrics(Shown):
    """The gauges `ringworld_<figure>`, by stage; those of a source by source too."""

    def __init__(self, stage: str) -> None:
        self._meter = Meter(stage)

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Set all gauges."""
        self._meter.set(**{name: value for name, value in figures.items() if "/" not in name})
        for source, values in line["sources"].items():
            self._meter.set_of_source(source, **{f"source_{name}": value for name, value in values.items()})


class Terminal(Shown):
    """The bar of the terminal that runs the recipe. reports: of `progress.following`."""

    def __init__(self, reports: Any) -> None:
        self._reports = reports

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Move the bar."""
        shown = {name: figures[name] for name in SHOWN if name in figures}
        self._reports.report.remote(line["step"] + 1, shown)
