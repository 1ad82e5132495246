"""The discriminator that a VQGAN is trained against, and how its gradient is weighed (arXiv 2012.09841, section 3.1).

In: real frames and reconstructions. Out: a gradient that makes reconstructions look real, scaled to the size of the
gradient of the reconstruction loss at the decoder's last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 32
"""Channels of the discriminator's first layer; taming-transformers has 64, for frames of 256 pixels."""


def patch_discriminator(seed: int, width: int = WIDTH) -> nn.Sequential:
    """PatchGAN (arXiv 1611.07004) with two strided layers: pixels [n, 3, H, W] to logits [n, 1, H/4, W/4].

    Each logit says of a patch of 26x26 pixels whether it is real. Weights are N(0, 0.02) by the seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, kernel, stride in ((width, 2 * width, 4, 2), (2 * width, 4 * width, 3, 1)):
            convolution = nn.Conv2d(before, after, kernel, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(4 * width, 1, 3, 1, 1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
    return nn.Sequential(*layers)


class Adversary:
    """A discriminator and its optimizer."""

    def __init__(self, seed: int, lr: float) -> None:
        self.discriminator = patch_discriminator(seed)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9), foreach=True)

    def gradient(
        self, sample: torch.Tensor, reconstruction_loss: torch.Tensor, last_weight: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, float]:
        """The gradient in `sample` of both losses together, of its shape, and the adaptive weight that was taken.

        sample: reconstructions [n, 3, H, W] with the decoder's graph. The adaptive weight (equation 7) is
        |d reconstruction_loss / d last_weight| / |d adversarial / d last_weight|, at most 1e4, times `weight`.
        """
        (real_enough,) = torch.autograd.grad(-self.discriminator(sample).float().mean(), sample)
        (like_the_frame,) = torch.autograd.grad(reconstruction_loss, sample)
        norms = [
            torch.autograd.grad(sample, last_weight, one, retain_graph=True)[0].norm()
            for one in (like_the_frame, real_enough)
        ]
        adaptive = weight * float((norms[0] / (norms[1] + 1e-4)).clamp(max=1e4))
        return like_the_frame + adaptive * real_enough, adaptive

    def step(self, real: torch.Tensor, reconstructed: torch.Tensor, lr: float) -> float:
        """Train the discriminator by the hinge loss on detached frames [n, 3, H, W]; returns the loss."""
        self.optimizer.param_groups[0]["lr"] = lr
        hinge = F.relu(1 - self.discriminator(real).float()).mean()
        hinge = 0.5 * (hinge + F.relu(1 + self.discriminator(reconstructed).float()).mean())
        self.optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        self.optimizer.step()
        return hinge.item()

    def state_dict(self) -> dict[str, Any]:
        """For `torch.save`."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
