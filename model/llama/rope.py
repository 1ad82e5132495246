"""Rotary position tables that stay exact at a million tokens.

An angle is position x theta^(-2i/d). In fp32 the tables are off by up to 1e-2 at position 1M with theta 5e7, in bf16 by
1.6 at position 1,000. `ExactRotaryEmbedding` computes angles in fp64 and rounds their cosines and sines to fp32, at
little cost beside one layer. `ExactLlamaAttention` turns queries and keys by these tables and rounds them once, as LWM
does, before a cache or an attention function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from model.llama.config import attention_sizes

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [B, T, H, D], k [B, T, Hkv, D], cos and sin fp32 [B, T, D]) to q and k turned, in their own dtypes."""


def rope_tables(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [*positions.shape, head_dim], laid out for half-rotation: each half holds all angles."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents
    cos, sin = angles.cos().to(torch.float32), angles.sin().to(torch.float32)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


class ExactRotaryEmbedding(nn.Module):
    """In the place of `LlamaRotaryEmbedding` of rope_type "default": same call, exact fp32 tables in any model.

    It has no buffer that a cast of the model could round. Raises ValueError on another rope_type.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        if rope.get("rope_type") != "default":
            raise ValueError(f"exact tables exist for rope_type 'default', not {rope.get('rope_type')!r}")
        self.theta = float(rope["rope_theta"])
        self.head_dim = attention_sizes(config)[2]

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: not used. position_ids: int64 [B, T]. Returns cos and sin, fp32 [B, T, head_dim]."""
        return rope_tables(position_ids, self.theta, self.head_dim)


def rotate_by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `Rotate`: in fp32 at least, rounded once."""
    turned_q, turned_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


class ExactLlamaAttention(LlamaAttention):
    """Transformers' attention for fp32 tables: q, k and v reach the cache and the attention function in one dtype."""

    rotate: Rotate = staticmethod(rotate_by_torch)
    """What turns queries and keys where there is no cache; a kernel may take its place."""

    def forward(  # type: ignore[override]  # the others pass on
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result of `LlamaAttention.forward`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        turn = self.rotate if past_key_values is None else rotate_by_torch
        q, k, v = (x.transpose(1, 2) for x in (*turn(q, k, *position_embeddings), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights
