"""A Llama's forward over tokens in one line, with the attention left to the caller: what prefill and decoding share.

In: a `LlamaForCausalLM` of any of our classes, ids and positions [T], a function that attends, and what multiplies by
the weights. Out: final hidden states. Weights are read from the model's own modules, so nothing is copied. Most of a
small model's time for one token goes to calling operators, of which there are as few as the mathematics needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k and v [T, Hkv, D], turned) to the attention's output [T, H, D] in the dtype of q."""


class WholeWeights:
    """The products of a model's matrices with tokens, where each rank has all of its weights.

    A matrix is asked for in the order of the forward, a layer's after `enter`. Others may split or gather them.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def embedded(self, ids: Tensor) -> Tensor:
        """Rows [T, hidden] of the table of embeddings."""
        return F.embedding(ids, self.model.model.embed_tokens.weight)

    def enter(self, layer: int) -> None:
        """The layer of this number is next."""

    def projected(self, heads: LlamaAttention, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of x [T, hidden], with all their heads side by side: [T, H * D], [T, Hkv * D]."""
        return [self.linear(part, x) for part in (heads.q_proj, heads.k_proj, heads.v_proj)]

    def attended(self, heads: LlamaAttention, out: Tensor) -> Tensor:
        """The output projection of an attention's result [T, H * D]: [T, hidden]."""
        return self.linear(heads.o_proj, out)

    def mlp(self, mlp: LlamaMLP, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        gate = mlp.act_fn(self.linear(mlp.gate_proj, x))
        return self.linear(mlp.down_proj, gate.mul_(self.linear(mlp.up_proj, x)))

    def linear(self, part: nn.Linear, x: Tensor) -> Tensor:
        """A product with one of the layer's matrices."""
        return F.linear(x, part.weight, part.bias)


def final_hidden(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, attention: Attention, weights: WholeWeights
) -> Tensor:
    """Final hidden states [T, hidden] of tokens ids at `positions`, int64 [T] each. Without gradients or dropout."""
    llama = model.model
    hidden = weights.embedded(ids)
    cos, sin = (table[0].unsqueeze(1) for table in llama.rotary_emb(hidden, positions.unsqueeze(0)))
    # rotate_half(x) * sin is x with its halves swapped, times sin with its first half negated.
    half = sin.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    for number, layer in enumerate(llama.layers):
        heads = layer.self_attn
        weights.enter(number)
        projections = weights.projected(heads, _norm(layer.input_layernorm, hidden))
        q, k, v = (x.unflatten(-1, (-1, heads.head_dim)) for x in projections)
        out = attention(number, _turned(q, cos, sin), _turned(k, cos, sin), v)
        hidden = hidden + weights.attended(heads, out.flatten(1))
        hidden = hidden + weights.mlp(layer.mlp, _norm(layer.post_attention_layernorm, hidden))
    return _norm(llama.norm, hidden)


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by its angles, in fp32 at least, rounded once."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
