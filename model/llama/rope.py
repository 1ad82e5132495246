"""Rotary position tables that stay exact at a million tokens.

An angle is position x theta^(-2i/d). In fp32 the tables are off by up to 1e-2 at position 1M with theta 5e7, in bf16 by
1.6 at position 1,000. Here angles are computed in fp64 and only their cosines and sines are rounded, which costs
nothing beside one layer and leaves transformers' Llama as it is: `ExactRotaryEmbedding` takes its rotary's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

#: Attention functions that take q and k in fp32 beside v in the model's dtype (see `rounding_rotated`).
FP32_TABLES: set[str] = set()


def rope_tables(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [*positions.shape, head_dim], laid out for half-rotation: each half holds all angles."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents
    cos, sin = angles.cos().to(torch.float32), angles.sin().to(torch.float32)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


class ExactRotaryEmbedding(nn.Module):
    """Drop-in for `LlamaRotaryEmbedding` of rope_type "default": same call, exact angles, no buffer a cast can spoil.

    Tables are fp32 where the attention function rounds q and k after the rotation (as LWM does), and the hidden states'
    dtype for stock attention functions, which want q, k and v in one dtype.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        if rope.get("rope_type") != "default":
            raise ValueError(f"exact tables exist for rope_type 'default', not {rope.get('rope_type')!r}")
        self.config = config
        self.theta = float(rope["rope_theta"])
        self.head_dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: hidden states, for their dtype. position_ids: int64 [B, T]. Returns cos and sin [B, T, head_dim]."""
        cos, sin = rope_tables(position_ids, self.theta, self.head_dim)
        dtype = torch.float32 if self.config._attn_implementation in FP32_TABLES else x.dtype
        return cos.to(dtype), sin.to(dtype)


def rounding_rotated(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function: q and k, turned in fp32, are rounded once to v's dtype before they enter it."""

    def rounded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attention(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    return rounded
