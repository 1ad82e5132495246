"""Detects spikes of the loss beyond its ordinary noise, by the losses of the steps before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

FLOOR = 0.01
"""Least standard deviation, as a share of the mean, so that a nearly constant loss has no spikes by its noise."""


class SpikeDetector:
    """A spike is a loss more than `sigmas` standard deviations above the mean of the last `window` losses taken.

    There are none until half a window has been taken. losses: those taken before.
    """

    def __init__(self, sigmas: float, window: int, losses: Sequence[float] = ()) -> None:
        self.sigmas = sigmas
        self._least = max(2, window // 2)
        self._losses = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The losses in the window, the oldest first: the detector's whole state."""
        return list(self._losses)

    def __call__(self, loss: float) -> bool:
        """Whether the loss is a spike; False for a loss that is not finite."""
        return math.isfinite(loss) and len(self._losses) >= self._least and loss > self.threshold()

    def threshold(self) -> float:
        """The loss above which a step is a spike."""
        mean = math.fsum(self._losses) / len(self._losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self._losses) / len(self._losses)
        return mean + self.sigmas * max(math.sqrt(variance), FLOOR * abs(mean))

    def take(self, loss: float) -> None:
        """Add the loss of a completed step to the window."""
        self._losses.append(loss)
