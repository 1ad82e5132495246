"""A Llama's forward over tokens in one line, with the attention left to the caller: what prefill and decoding share.

In: a `LlamaForCausalLM` of any of our classes, ids and positions [T], and a function that attends. Out: final hidden
states. Weights are read from the model's own modules, so nothing is copied; for one token of a small model most of the
time goes to calling operators, of which there are as few here as the mathematics needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k and v [T, Hkv, D], turned) to the attention's output [T, H, D] in the dtype of q."""


def final_hidden(model: LlamaForCausalLM, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """Final hidden states [T, hidden] of tokens ids at `positions`, int64 [T] each. Without gradients or dropout."""
    llama = model.model
    hidden = F.embedding(ids, llama.embed_tokens.weight)
    cos, sin = (table[0].unsqueeze(1) for table in llama.rotary_emb(hidden, positions.unsqueeze(0)))
    # rotate_half(x) * sin is x with its halves swapped, times sin with its first half negated.
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    for number, layer in enumerate(llama.layers):
        heads, mlp = layer.self_attn, layer.mlp
        x = _norm(layer.input_layernorm, hidden)
        projections = (heads.q_proj, heads.k_proj, heads.v_proj)
        q, k, v = (_linear(part, x).unflatten(-1, (-1, heads.head_dim)) for part in projections)
        out = attention(number, _turned(q, cos, sin), _turned(k, cos, sin), v)
        hidden = hidden + _linear(heads.o_proj, out.flatten(1))
        x = _norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + _linear(mlp.down_proj, mlp.act_fn(_linear(mlp.gate_proj, x)).mul_(_linear(mlp.up_proj, x)))
    return _norm(llama.norm, hidden)


def _linear(part: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias)


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by its angles, in fp32 at least, rounded once."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
