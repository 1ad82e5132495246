"""PSNR, SSIM and the Fréchet distance against numbers worked out by hand or by numpy."""

import numpy as np
import pytest
import torch

from tokenization.codecs.vqgan.metrics import frechet_distance, psnr, ssim
from tokenization.codecs.vqgan.model import pixels_of
from tokenization.codecs.vqgan.perceptual import still_features


def test_psnr_of_known_errors() -> None:
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + np.uint8(255)) == pytest.approx(0.0)
    assert psnr(black + np.uint8(100), black + np.uint8(110)) == pytest.approx(28.1308, abs=1e-4)  # 20 log10(25.5)


def test_psnr_refuses_what_it_would_get_wrong() -> None:
    frame = np.zeros((4, 4, 3), dtype=np.uint8)
    for other in (frame[:2], frame.astype(np.float32), frame.astype(np.int16)):
        with pytest.raises(ValueError):
            psnr(frame, other)
    with pytest.raises(ValueError):
        psnr(frame[:0], frame[:0])


def noise(seed: int, frames: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)


def test_ssim_is_of_each_frame_and_falls_with_structure() -> None:
    frames = noise(0)
    other = frames.copy()
    other[:35] = 128  # in half of the frames no structure is left
    assert ssim(frames, frames) == pytest.approx(1.0)
    assert ssim(frames[:35], other[:35]) < 0.02
    assert ssim(frames, other) == pytest.approx((ssim(frames[:35], other[:35]) + 1) / 2, abs=1e-4)
    with pytest.raises(ValueError):
        ssim(frames, frames[:1])


def test_the_frechet_distance_is_that_of_the_features_gaussians() -> None:
    frames, others = noise(0), noise(1) // 2
    features = []
    for side in (frames, others):
        pixels = pixels_of(torch.from_numpy(side))
        features.append(still_features()(pixels)[-1].mean(dim=(2, 3)).double().numpy())
    means = [one.mean(0) for one in features]
    covariances = [np.cov(one, rowvar=False) for one in features]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root
    assert frechet_distance(frames, others) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(frames, frames) == pytest.approx(0.0, abs=1e-3)
    assert frechet_distance(frames[:1], frames) is None
