"""How close reconstructions are to their frames: by pixels, by structure, and by the distribution of what they show."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tokenization.codecs.vqgan.model import pixels_of

_BATCH = 64  # frames of a pass, so that no corpus is held


def psnr(frames: np.ndarray, reconstructions: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB between two uint8 arrays of one shape: 10 log10(255^2 / MSE), over all pixels.

    Infinite where they are equal. Raises ValueError on different or empty shapes or a dtype other than uint8.
    """
    _require_pairs("psnr", frames, reconstructions)
    error = float(np.square(frames.astype(np.int32) - reconstructions).mean(dtype=np.float64))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(frames: np.ndarray, reconstructions: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004; Gaussian window of 11 pixels, sigma 1.5) of frame pairs.

    frames, reconstructions: uint8 [n, H, W, 3], at least 11 x 11. 1 where they are equal. Raises ValueError as `psnr`.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_pairs("ssim", frames, reconstructions)
    total = 0.0
    for start in range(0, len(frames), _BATCH):
        one, other = (_channels_first(side[start : start + _BATCH]).float() for side in (frames, reconstructions))
        found = structural_similarity_index_measure(other, one, data_range=255.0, reduction="sum")
        assert isinstance(found, torch.Tensor)  # a pair where more is asked for
        total += float(found)
    return total / len(frames)


def frechet_distance(frames: np.ndarray, reconstructions: np.ndarray) -> float | None:
    """Fréchet distance between what frames and reconstructions show, as the FID (arXiv 1706.08500), on other features.

    The features are TransNetV2's third stack (`perceptual.StillFeatures`), averaged over a frame: 256 numbers. So it
    is comparable between VQGANs on the same frames, and with no published FID. Of fewer frames than features the
    covariances are of low rank, and the distance is that between those. frames, reconstructions: uint8 [n, H, W, 3],
    not necessarily pairs. None of fewer than 2, and where the features' package is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    from tokenization.codecs.vqgan.perceptual import has_features

    if min(len(frames), len(reconstructions)) < 2 or not has_features():
        return None
    distance = FrechetInceptionDistance(feature=_MeanFeatures())
    for side, is_real in ((frames, True), (reconstructions, False)):
        for start in range(0, len(side), _BATCH):
            distance.update(_channels_first(side[start : start + _BATCH]), real=is_real)
    return float(distance.compute())


class _MeanFeatures(nn.Module):
    """Frames uint8 [n, 3, H, W] to features [n, 256]."""

    num_features = 256

    def __init__(self) -> None:
        from tokenization.codecs.vqgan.perceptual import still_features

        super().__init__()
        self.network = still_features()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.network(pixels_of(frames.permute(0, 2, 3, 1)))[-1].mean(dim=(2, 3))


def _channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)


def _require_pairs(name: str, frames: np.ndarray, reconstructions: np.ndarray) -> None:
    if frames.shape != reconstructions.shape or not frames.size:
        raise ValueError(f"{name} of shapes {frames.shape} and {reconstructions.shape}")
    if frames.dtype != np.uint8 or reconstructions.dtype != np.uint8:
        raise ValueError(f"{name} of {frames.dtype} and {reconstructions.dtype}, not of uint8 pixels")
