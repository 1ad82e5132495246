"""Tells a spike of the loss from its ordinary noise, by the losses of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

FLOOR = 0.01
"""Of the mean: the least standard deviation reckoned with, lest a loss that hardly moves finds spikes in nothing."""


class SpikeDetector:
    """Called with a step's loss: whether it lies more than `sigmas` standard deviations above the mean of the last
    `window` losses taken. Nothing is a spike until half a window has been seen. losses: those seen before.
    """

    def __init__(self, sigmas: float, window: int, losses: Sequence[float] = ()) -> None:
        self.sigmas = sigmas
        self._least = max(2, window // 2)
        self._losses = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The losses reckoned with, the oldest first: all that there is to restore."""
        return list(self._losses)

    def __call__(self, loss: float) -> bool:
        """Whether the loss is a spike; False for what is not finite, which is no question of the losses before it."""
        return math.isfinite(loss) and len(self._losses) >= self._least and loss > self.threshold()

    def threshold(self) -> float:
        """The loss above which a step is a spike."""
        mean = math.fsum(self._losses) / len(self._losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self._losses) / len(self._losses)
        return mean + self.sigmas * max(math.sqrt(variance), FLOOR * abs(mean))

    def take(self, loss: float) -> None:
        """Reckon with the loss of a step that was made."""
        self._losses.append(loss)
