"""Steps that wait for the checkpoint after them, so that a step which the stage goes back from is never published."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """line: as `metrics/` keeps it. figures: the same for people, by `step_figures`. time: seconds since the epoch."""

    line: dict[str, Any]
    figures: dict[str, float]
    time: float


Publisher = Callable[[Sequence[Step]], None]
"""Called with the steps between two checkpoints, at least one, in order; the last has `checkpoint_seconds` too."""


class HeldSteps:
    """The steps since the last checkpoint."""

    def __init__(self, publishers: Sequence[Publisher]) -> None:
        self._publishers = publishers
        self._steps: list[Step] = []

    def add(self, line: dict[str, Any], figures: dict[str, float]) -> None:
        """Hold a step that was made just now."""
        self._steps.append(Step(line, figures, time.time()))

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
