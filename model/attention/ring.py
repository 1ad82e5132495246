"""Packed ring attention: exact causal attention within each document of a sequence that is spread over ranks.

In: this rank's queries, keys and values and the plan of the sequence. Out: this rank's rows of the output. Forward,
a rank sends for the keys it lacks, computes on its own meanwhile, then takes each peer's keys in a fixed order and
merges (Ring Attention, arXiv 2310.01889, with the exchange cut down to what causality and document borders leave).
Backward, it fetches the same keys again, since keeping them would undo what sharing the sequence saves, and returns
their gradients to their owners. Every sum runs in the accumulator dtype, in an order fixed by the plan, with one cast
at the end, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.exchange import Exchange, Transfer, as_exchange
from model.attention.kernels import accumulator_dtype, attend_, attend_backward_, empty_result
from model.attention.plan import RankPlan, SequencePlan


def packed_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SequencePlan,
    group: dist.ProcessGroup | Exchange | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of this rank's tokens over the tokens before them in their own documents, wherever those are held.

    q [T, H, D], k and v [T, Hkv, D]: rows in the order of `plan.indices(rank)`, one dtype, Hkv dividing H. group: the
    `plan.sp` ranks that share the sequence; None for one rank. scale: 1 / sqrt(D) where None. Returns [T, H, D] in the
    dtype of q. Every rank of the group has to call it, and its backward, in the same order; a rank whose documents are
    all its own communicates nothing. Raises ValueError where the tensors or the group do not fit the plan.
    """
    exchange = as_exchange(group)
    if exchange.size != plan.sp:
        raise ValueError(f"the plan shares the sequence over {plan.sp} ranks, the group has {exchange.size}")
    if not len(q) == len(k) == len(v) == plan.tokens_per_rank:
        raise ValueError(f"q, k, v hold {len(q)}, {len(k)}, {len(v)} tokens; the plan {plan.tokens_per_rank} a rank")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; one is needed")
    return _PackedRingAttention.apply(q, k, v, plan.rank(exchange.rank), exchange, scale)


class _PackedRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RankPlan,
        exchange: Exchange,
        scale: float | None,
    ) -> Tensor:
        transfer, received = _fetch_keys(k, v, plan, exchange)
        out, lse = empty_result(q)
        attend_(out, lse, q, k, v, plan.local, scale)
        for fetch in plan.fetches:
            transfer.wait(fetch.peer)
            keys, values = received[fetch.peer]
            attend_(out, lse, q, keys, values, fetch.runs, scale)
        transfer.finish()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.exchange, ctx.scale = plan, exchange, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, exchange, scale = ctx.plan, ctx.exchange, ctx.scale
        transfer, received = _fetch_keys(k, v, plan, exchange)
        grad_out = grad_out.contiguous()
        dtype = accumulator_dtype(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        attend_backward_(dq, dk, dv, grad_out, q, k, v, out, lse, plan.local, scale)
        remote: dict[int, Tensor] = {}
        for fetch in plan.fetches:
            transfer.wait(fetch.peer)
            keys, values = received[fetch.peer]
            remote[fetch.peer] = torch.zeros_like(received[fetch.peer], dtype=dtype)
            dk_remote, dv_remote = remote[fetch.peer]
            attend_backward_(dq, dk_remote, dv_remote, grad_out, q, keys, values, out, lse, fetch.runs, scale)
        transfer.finish()
        _return_gradients(dk, dv, remote, plan, exchange)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _fetch_keys(k: Tensor, v: Tensor, plan: RankPlan, exchange: Exchange) -> tuple[Transfer, dict[int, Tensor]]:
    """Post the exchange of keys: the transfer, and what it fills: keys and values [2, n, Hkv, D] by peer."""
    received = {fetch.peer: k.new_empty(2, fetch.n_keys, *k.shape[1:]) for fetch in plan.fetches}
    sent = {}
    for serve in plan.serves:
        sent[serve.peer] = k.new_empty(2, serve.n_keys, *k.shape[1:])
        for rows, x in zip(sent[serve.peer], (k, v)):
            torch.cat([x[a:b] for a, b in serve.ranges], out=rows)
    return exchange.start(sent, received), received


def _return_gradients(dk: Tensor, dv: Tensor, remote: dict[int, Tensor], plan: RankPlan, exchange: Exchange) -> None:
    """Send the gradients of fetched keys to their owners; add those of this rank's keys, peer after peer by rank."""
    received = {serve.peer: dk.new_empty(2, serve.n_keys, *dk.shape[1:]) for serve in plan.serves}
    transfer = exchange.start(remote, received)
    for serve in plan.serves:
        transfer.wait(serve.peer)
        start = 0
        for a, b in serve.ranges:
            rows = slice(start, start + b - a)
            dk[a:b].add_(received[serve.peer][0, rows])
            dv[a:b].add_(received[serve.peer][1, rows])
            start = rows.stop
    transfer.finish()
