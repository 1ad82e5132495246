"""A Llama's forward over a whole sequence, without gradients, that holds as little of it as it can.

In: a `LlamaForCausalLM` of any of our classes, and this rank's ids and positions of a sequence that ranks share by a
plan. Out: hidden states. The layers' own modules run, on some thousand tokens at a time; only attention takes all.
"""

from __future__ import annotations

from torch import Tensor
from transformers import LlamaForCausalLM

from model.attention.p2p import Exchange
from model.attention.plan.runs import RankPlan
from model.attention.ring import attend_blocks
from model.llama.config import attention_sizes
from model.llama.rope import rotate_by_torch


def hidden_in_tiles(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, plan: RankPlan, exchange: Exchange, tile: int
) -> Tensor:
    """Hidden states [T, hidden] before the final norm, which is `model.model.norm`. Collective.

    ids, positions: int64 [T], in the order of the rank's tokens; the plan's Ulysses degree is 1. tile: tokens that all
    but the attention takes at once, and adds to the hidden states in place. Of all T tokens there exist these, and of
    one layer the queries, the keys and values, the attention's result, and what `attend_blocks` holds of others.
    """
    llama = model.model
    hidden = llama.embed_tokens(ids)
    heads, kv_heads, head_dim = attention_sizes(model.config)
    q = hidden.new_empty(len(ids), heads, head_dim)
    kv = hidden.new_empty(len(ids), 2, kv_heads, head_dim)
    tiles = [slice(start, start + tile) for start in range(0, len(ids), tile)]
    tables = [llama.rotary_emb(hidden, positions[None, rows]) for rows in tiles]
    for layer in llama.layers:
        attention = layer.self_attn
        for rows, (cos, sin) in zip(tiles, tables):
            x = layer.input_layernorm(hidden[None, rows])
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            new_q, new_k, new_v = (part(x).unflatten(-1, (-1, head_dim)) for part in projections)
            new_q, new_k = rotate_by_torch(new_q, new_k, cos, sin)
            q[rows], kv[rows, 0], kv[rows, 1] = new_q[0], new_k[0], new_v[0]
        out, _ = attend_blocks(q, kv, plan, exchange, attention.scaling)
        for rows in tiles:
            residual = hidden[rows]
            residual += attention.o_proj(out[rows].to(q.dtype).flatten(1))
            residual += layer.mlp(layer.post_attention_layernorm(residual))
        del out
    return hidden
