"""Packed ring attention over a whole sequence: every way to share it, and its results in packed order.

In: [q, k, v, grad_out] of a packed sequence and a plan. Out: [out, dq, dk, dv], by rank or of the whole sequence, from
a group of threads on the device where the tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.attention.p2p import Group
from model.attention.plan.layouts import Assignment
from model.attention.plan.options import Route
from model.attention.plan.planner import LAYOUTS
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention
from testing.reorder import dispatch, in_order
from testing.thread_ranks import run_in_threads

Layout = Callable[[np.ndarray, int], Assignment]
"""(cu_seqlens, ranks of the ring) to who holds what."""


def every_plan(
    cu_seqlens: np.ndarray, sp: int, kv_heads: int, layouts: Mapping[str, Layout] = LAYOUTS
) -> Iterator[SequencePlan]:
    """Plans of `sp` ranks by every Ulysses degree, layout and route; one where a ring of one leaves nothing to choose.

    cu_seqlens: int64 [n_documents + 1].
    """
    for degree in (u for u in range(1, sp + 1) if sp % u == 0 and kv_heads % u == 0):
        ring = sp // degree
        for name, layout in layouts.items() if ring > 1 else list(layouts.items())[:1]:
            assignment = layout(cu_seqlens, ring)
            routes: tuple[Route, ...] = ("direct", "relay") if ring > 1 else ("direct",)
            for route in routes:
                yield SequencePlan(cu_seqlens, assignment, ring, degree, route, name)


def forward_backward(tensors: Sequence[Tensor], plan: SequencePlan, group: Group, rank: int) -> list[Tensor]:
    """This rank's rows of [out, dq, dk, dv] from the whole sequence's [q, k, v, grad_out]."""
    q, k, v, grad = (dispatch(x, plan, rank) for x in tensors)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    # Autograd has one thread a card, in which the backward of one rank would wait for that of another for ever.
    with torch.autograd.set_multithreading_enabled(False):
        out = packed_ring_attention(q, k, v, plan, group)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def packed_results(tensors: Sequence[Tensor], plan: SequencePlan) -> list[Tensor]:
    """[out, dq, dk, dv] of the whole sequence, in packed order, from a group of threads."""
    parts, _ = run_in_threads(lambda exchange: forward_backward(tensors, plan, exchange, exchange.rank), plan.sp)
    return packed_order(parts, plan)


def packed_order(parts: Sequence[Sequence[Tensor]], plan: SequencePlan) -> list[Tensor]:
    """Results by rank back to packed order."""
    return [in_order([part[i] for part in parts], plan) for i in range(len(parts[0]))]
