"""Packed ring attention: exact causal attention within each document of a sequence that is spread over ranks.

In: this rank's queries, keys and values and the plan of the sequence. Out: this rank's rows of the output. A rank
computes on its own keys while others' travel, then on block after block of its plan, and merges the results (Ring
Attention, arXiv 2310.01889, without the exchange that causality and document borders make needless). The backward
fetches the same keys again, which costs no memory between, and returns their gradients to their owners. Every sum runs
in the accumulator dtype, in an order fixed by the plan, with one cast at the end, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.block_exchange import blocks
from model.attention.flash_kernels import accumulator_dtype, attend, attend_, attend_backward_
from model.attention.p2p import Exchange, Group, as_exchange
from model.attention.plan.runs import RankPlan
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.saved_results import save_result, saved_result
from model.attention.ulysses import heads_for_tokens, tokens_for_heads


def packed_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, group: Group = None, scale: float | None = None
) -> Tensor:
    """Attention of this rank's tokens over the tokens before them in their own documents, wherever those are held.

    q [T, H, D], k and v [T, Hkv, D]: rows in the order of `plan.indices(rank)`, one dtype, Hkv dividing H. group: the
    `plan.sp` ranks that share the sequence; None for one rank. scale: 1 / sqrt(D) where None. Returns [T, H, D] in the
    dtype of q. Every rank of the group has to call it, and its backward, in the same order. Without a Ulysses degree a
    rank that shares no document communicates nothing. Raises ValueError where tensors or group do not fit the plan.
    """
    exchange = as_exchange(group)
    if exchange.size != plan.sp:
        raise ValueError(f"the plan shares the sequence over {plan.sp} ranks, the group has {exchange.size}")
    if not len(q) == len(k) == len(v) == plan.tokens_per_rank:
        raise ValueError(f"q, k, v hold {len(q)}, {len(k)}, {len(v)} tokens; the plan {plan.tokens_per_rank} a rank")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; one is needed")
    if k.shape[1] % plan.ulysses:
        raise ValueError(f"the plan's Ulysses degree {plan.ulysses} does not divide {k.shape[1]} kv heads")
    q, k, v = tokens_for_heads(q, k, v, exchange, plan.ulysses)
    out = _PackedRingAttention.apply(q, k, v, plan.rank(exchange.rank), exchange, scale)
    return heads_for_tokens(out, exchange, plan.ulysses)


def attend_blocks(
    q: Tensor, kv: Tensor, plan: RankPlan, exchange: Exchange, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The forward alone, over this rank's keys and then others': out [T, H, D] and lse [T, H], accumulator dtype.

    q [T, H, D], kv [T, 2, Hkv, D], contiguous. At most three blocks of other ranks' keys are held at once.
    """
    steps = blocks(kv, plan, exchange)
    keys, values = kv.unbind(1)
    out, lse = attend(q, keys, values, next(steps).runs, scale)
    for block in steps:
        keys, values = block.kv.unbind(1)
        attend_(out, lse, q, keys, values, block.runs, scale)
    return out, lse


class _PackedRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RankPlan, exchange: Exchange, scale: float | None
    ) -> Tensor:
        if (stored := saved_result(q.device)) is not None:
            out, lse = stored
        else:
            out, lse = attend_blocks(q, torch.stack((k, v), 1), plan, exchange, scale)
            out = out.to(q.dtype)
            save_result(out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.exchange, ctx.scale = plan, exchange, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        kv = torch.stack((k, v), 1)
        dq, dkv = (torch.zeros_like(x, dtype=accumulator_dtype(q.dtype)) for x in (q, kv))
        for block in blocks(kv, ctx.plan, ctx.exchange, dkv):
            assert block.dkv is not None
            (keys, values), (dk, dv) = block.kv.unbind(1), block.dkv.unbind(1)
            attend_backward_(dq, dk, dv, grad_out, q, keys, values, out, lse, block.runs, ctx.scale)
        dk, dv = (x.to(q.dtype) for x in dkv.unbind(1))
        return dq.to(q.dtype), dk, dv, None, None, None
