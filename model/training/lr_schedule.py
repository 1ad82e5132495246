"""Learning-rate schedules of LWM: a linear warm-up, then constant or a cosine down to a final rate.

In: the number of the update, counted from 0. Out: its learning rate, a float. A pure function of the update, so that a
resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Learning rate by update, as in LWM's optimizer (arXiv 2402.08268 and its released code).

    Under warm-up it climbs linearly from 0 at update 0 to `peak` at update `warmup_steps`. Then "constant" stays at
    `peak`, and "cosine" falls along half a cosine to `final`, reached at update `decay_steps`, which counts the
    warm-up's updates too, and kept from there.
    """

    peak: float
    kind: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine"):
            raise ValueError(f'schedule kind must be "constant" or "cosine", not {self.kind!r}')
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, not {self.warmup_steps}")
        if self.kind == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ValueError(
                f"a cosine schedule needs decay_steps greater than warmup_steps ({self.warmup_steps}), "
                f"which they include; got {self.decay_steps}"
            )

    def __call__(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "constant" or self.decay_steps is None:
            return self.peak
        progress = min((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps), 1.0)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
