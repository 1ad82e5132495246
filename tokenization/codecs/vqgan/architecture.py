"""The diffusers model that the sizes of a VQGAN describe; apart from them, since it takes torch to import."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel

from tokenization.codecs.vqgan.config import VQGANConfig


def build_vqgan(config: VQGANConfig, seed: int | None = None) -> Any:
    """A diffusers `VQModel` of these sizes, fp32, on the default device; under `torch.device("meta")` it costs nothing.

    With a seed the weights are a pure function of it and the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        levels = len(config.channels)
        return VQModel(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.res_blocks,
            latent_channels=config.latent_channels,
            sample_size=config.resolution,
            num_vq_embeddings=config.codebook_size,
            norm_num_groups=config.norm_groups,
            vq_embed_dim=config.embed_dim,
            mid_block_add_attention=False,
        )
