"""Frames mirrored and turned: the seven ways, beside its own, in which a square frame can lie.

A film that is mirrored or turned moves in another direction over other codes, and is as good to learn motion from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

Turn = Literal["mirrored", "flipped", "half", "transposed", "quarter", "three-quarters", "antitransposed"]
"""`mirrored`: left and right exchanged; `flipped`: top and bottom; `half`, `quarter` and `three-quarters` of a turn
against the clock; `transposed`: over the falling diagonal; `antitransposed`: over the rising one."""

_TURNED: dict[Turn, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored": lambda frames: frames[:, :, ::-1],
    "flipped": lambda frames: frames[:, ::-1],
    "half": lambda frames: frames[:, ::-1, ::-1],
    "transposed": lambda frames: frames.swapaxes(1, 2),
    "quarter": lambda frames: frames.swapaxes(1, 2)[:, ::-1],
    "three-quarters": lambda frames: frames.swapaxes(1, 2)[:, :, ::-1],
    "antitransposed": lambda frames: frames.swapaxes(1, 2)[:, ::-1, ::-1],
}


def turned(frames: np.ndarray, turn: Turn) -> np.ndarray:
    """A copy of square frames [n, size, size, channels], turned."""
    return np.ascontiguousarray(_TURNED[turn](frames))
