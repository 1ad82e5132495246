"""A Llama's forward over tokens in one line, without gradients. `final_hidden` leaves the attention to the caller, and
is what prefill and decoding share; `hidden_in_tiles` holds as little as it can of a whole sequence, for scoring.

In: a `LlamaForCausalLM` of any of our classes, ids and positions [T], and what attends. Out: hidden states. Weights are
read from the model's own modules, so nothing is copied; for one token of a small model most of the time goes to calling
operators, of which there are as few here as the mathematics needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from model.attention.p2p import Exchange
from model.attention.plan.runs import RankPlan
from model.attention.ring import attend_blocks
from model.llama.config import attention_sizes

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k and v [T, Hkv, D], turned) to the attention's output [T, H, D] in the dtype of q."""


def final_hidden(model: LlamaForCausalLM, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """Final hidden states [T, hidden] of tokens ids at `positions`, int64 [T] each. Without gradients or dropout."""
    llama = model.model
    hidden = F.embedding(ids, llama.embed_tokens.weight)
    cos, sin = _angles(llama.rotary_emb(hidden, positions.unsqueeze(0)))
    for number, layer in enumerate(llama.layers):
        heads, mlp = layer.self_attn, layer.mlp
        x = _norm(layer.input_layernorm, hidden)
        projections = (heads.q_proj, heads.k_proj, heads.v_proj)
        q, k, v = (_linear(part, x).unflatten(-1, (-1, heads.head_dim)) for part in projections)
        out = attention(number, _turned(q, cos, sin), _turned(k, cos, sin), v)
        hidden = hidden + _linear(heads.o_proj, out.flatten(1))
        x = _norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + _mlp(mlp, x)
    return final_norm(model, hidden)


def final_norm(model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """Final hidden states [T, hidden], of which the head makes logits, from those before the last norm."""
    return _norm(model.model.norm, hidden)


def hidden_in_tiles(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, plan: RankPlan, exchange: Exchange, tile: int
) -> Tensor:
    """Hidden states [T, hidden] before the final norm, of this rank's tokens of a sequence that ranks share by a plan.

    ids, positions: int64 [T], in the order of the rank's tokens; the plan's Ulysses degree is 1. All but the attention
    is computed `tile` tokens at a time, and added to the hidden states in place: of all T tokens there exist these, and
    of one layer the queries, the keys and values, the attention's result, and what `attend_blocks` holds of others.
    Collective.
    """
    llama = model.model
    hidden = F.embedding(ids, llama.embed_tokens.weight)
    heads, kv_heads, head_dim = attention_sizes(model.config)
    q = hidden.new_empty(len(ids), heads, head_dim)
    kv = hidden.new_empty(len(ids), 2, kv_heads, head_dim)
    tiles = [slice(start, start + tile) for start in range(0, len(ids), tile)]
    angles = [_angles(llama.rotary_emb(hidden, positions[None, rows])) for rows in tiles]
    for layer in llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for rows, (cos, sin) in zip(tiles, angles):
            x = _norm(layer.input_layernorm, hidden[rows])
            new_q, new_k, new_v = (
                _linear(part, x).unflatten(-1, (-1, head_dim))
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q[rows] = _turned(new_q, cos, sin)
            kv[rows, 0], kv[rows, 1] = _turned(new_k, cos, sin), new_v
        out, _ = attend_blocks(q, kv, plan, exchange, attention.scaling)
        for rows in tiles:
            residual = hidden[rows]
            residual += _linear(attention.o_proj, out[rows].to(q.dtype).flatten(1))
            residual += _mlp(mlp, _norm(layer.post_attention_layernorm, residual))
        del out
    return hidden


def _linear(part: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias)


def _mlp(mlp: LlamaMLP, x: Tensor) -> Tensor:
    return _linear(mlp.down_proj, mlp.act_fn(_linear(mlp.gate_proj, x)).mul_(_linear(mlp.up_proj, x)))


def _angles(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [T, 1, D] of tables [1, T, D] each, for `_turned`."""
    cos, sin = (table[0].unsqueeze(1) for table in tables)
    # rotate_half(x) * sin is x with its halves swapped, times sin with its first half negated.
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by its angles, in fp32 at least, rounded once."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
