"""The discriminator learns to tell frames from reconstructions, and its gradient is weighed by the other losses'."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenization.codecs.vqgan.adversary import Adversary, patch_discriminator


def test_the_gradient_of_both_has_the_sizes_asked_for_at_the_last_layer() -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1)
    hidden, pixels = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16)
    sample = last(hidden)
    adversary = Adversary(seed=0, lr=1e-3)
    gradient, weight = adversary.gradient(sample, F.mse_loss(sample, pixels), last.weight, 0.8)
    plain = 2 * (sample - pixels).detach() / sample.numel()  # of the mean squared error
    at_last = [torch.autograd.grad(last(hidden), last.weight, one)[0].norm() for one in (plain, gradient - plain)]
    assert float(at_last[1] / at_last[0]) == pytest.approx(0.8, rel=1e-2)
    assert weight > 0
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())


def test_it_learns_to_tell_reconstructions_from_frames() -> None:
    torch.manual_seed(0)
    adversary = Adversary(seed=0, lr=1e-3)
    frames = torch.rand(8, 3, 32, 32) * 2 - 1
    blurred = F.avg_pool2d(frames, 3, stride=1, padding=1)
    losses = [adversary.step(frames, blurred, 1e-3) for _ in range(30)]
    assert losses[0] == pytest.approx(1.0, abs=0.3)  # the hinge loss of one that says 0 of everything
    assert losses[-1] < 0.3
    discriminator = adversary.discriminator
    with torch.no_grad():
        assert float(discriminator(frames).mean()) > 0 > float(discriminator(blurred).mean())


def test_a_saved_adversary_goes_on_to_the_same_bits() -> None:
    frames, others = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, other = Adversary(seed=0, lr=1e-3), Adversary(seed=5, lr=1e-3)
    one.step(frames, others, 1e-3)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert one.step(frames, others, 1e-3) == other.step(frames, others, 1e-3)
    assert torch.equal(one.discriminator(frames), other.discriminator(frames))


def test_a_patch_has_one_logit() -> None:
    assert patch_discriminator(0)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 8, 8)
