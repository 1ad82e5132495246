"""How close a reconstruction is to its frame."""

from __future__ import annotations

import numpy as np


def psnr(frames: np.ndarray, reconstructions: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 arrays of one shape: 10 log10(255^2 / MSE), over all pixels.

    Infinite where they are equal. Raises ValueError on different or empty shapes or a dtype other than uint8.
    """
    if frames.shape != reconstructions.shape or not frames.size:
        raise ValueError(f"psnr of shapes {frames.shape} and {reconstructions.shape}")
    if frames.dtype != np.uint8 or reconstructions.dtype != np.uint8:
        raise ValueError(f"psnr of {frames.dtype} and {reconstructions.dtype}, not of uint8 pixels")
    error = float(np.square(frames.astype(np.int32) - reconstructions).mean(dtype=np.float64))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
