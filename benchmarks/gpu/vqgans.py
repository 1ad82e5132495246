"""LWM's VQGAN as its parts take it: without a decoder, of seeded weights, with a codebook that its latents use.

Fresh weights have a codebook of nearly equal entries, far from any latent, so every cell would be a tie. Here its
entries are drawn with the mean and covariance of the latents of pictures, as a trained codebook's lie: a cell has one
near entry and others not much farther, of which rounding may choose another.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan

TINY = VQGANConfig(
    resolution=32, channels=(8, 16), res_blocks=1, latent_channels=16, embed_dim=8, codebook_size=64, norm_groups=4
)


def seeded_model(config: VQGANConfig) -> Any:
    """A diffusers `VQModel` of these sizes that can encode alone, on the host."""
    model = build_vqgan(config, seed=0)
    del model.decoder, model.post_quant_conv
    return model


def latents_of(vqgan: VQGAN, frames: np.ndarray) -> Tensor:
    """fp32 [n, D, h, w] of frames uint8 [n, H, W, 3], in the VQGAN's own batches; n is a multiple of their size."""
    batches = torch.from_numpy(frames).to(vqgan.device).split(vqgan.batch_size)
    return torch.cat([vqgan.encode_latents(batch).float() for batch in batches])


@torch.no_grad()
def spread_codebook(vqgan: VQGAN, frames: np.ndarray) -> None:
    """Draw the codebook's entries as the latents of these frames lie."""
    cells = latents_of(vqgan, frames).permute(0, 2, 3, 1).flatten(0, 2).double()
    covariance = torch.cov(cells.T)
    jitter = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance), device=cells.device)
    drawn = torch.randn(vqgan.codebook.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entries = cells.mean(0) + drawn.to(cells.device) @ torch.linalg.cholesky(covariance + jitter).T
    vqgan.codebook.copy_(entries)


def spread_error(latents: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the exact latents about their mean: what all cells share tells none apart."""
    about = exact.double() - exact.double().mean(dim=(0, 2, 3), keepdim=True)
    return float((latents.double() - exact.double()).norm() / about.norm())


def agreement(codes: np.ndarray, others: np.ndarray) -> float:
    """Share of codes that are the same."""
    return float((codes == others).mean())


def compiled(model: Any, on_cuda: bool) -> Any:
    """A copy whose encoder is compiled; on a CPU it is traced alone, as code for it takes a minute to build."""
    twin = copy.deepcopy(model)
    twin.encoder.compile(backend="inductor" if on_cuda else "aot_eager", dynamic=False)
    return twin
