"""Packed ring attention and Ulysses on one card, its ranks as threads: every layout, route and degree against fp64.

What is measured is the error of out, dq, dk and dv over that of one kernel call on the same bf16 tensors. The ring may
add one rounding: a kernel rounds its softmax weights and its result to bf16, and of several blocks each result is
rounded before they are merged in fp32. That makes at most sqrt(3 / 2) = 1.22 times the error: 1.16 by an emulation of
FlashAttention-2's roundings, and 1.30 where it merges eight blocks in bf16. The merge alone is held against fp64, too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from benchmarks.gpu.part import Bench
from benchmarks.gpu.right.kernels import LEAST, LIMITS
from model.attention.flash_kernels import CallBounds, attend, attend_
from model.attention.plan.options import Route
from model.attention.plan.planner import LAYOUTS
from model.attention.plan.runs import KernelCall, Run
from model.attention.plan.sequence_plan import SequencePlan
from testing.dense_attention import dense_results, random_tensors, relative_error
from testing.packed_attention import every_plan, packed_results

DTYPE = torch.bfloat16
RANKS = (8, 4, 2)
HEADS, KV_HEADS = 16, 8
"""Of which every Ulysses degree up to 8 has a share."""
DOCUMENTS = ((0, 4600, 4601, 4602, 6100, 6145, 7777, 8192), (0, 70, 71, 72, 95, 96, 121, 128))
"""Boundaries, and those of a rehearsal: long and short documents, and two of one token."""
ROUTES: tuple[Route, ...] = ("direct", "relay")
OVER_ONE_KERNEL = 1.25
"""Largest error of a ring over that of one kernel call."""
MERGE_LIMIT = 2e-6
"""Largest relative error of a merge of eight blocks in fp32: some roundings of 6e-8 a block."""
PLANS = "plans beyond the part's time"
REST_SECONDS = 3.0
"""Kept for the rows after the plans."""


def run(bench: Bench) -> None:
    """One row a plan, the most ranks first; then a longer document, bounds on the device, and the merge alone."""
    size = bench.size(64, 8)
    documents = np.array(bench.size(*DOCUMENTS))
    case = _Case(bench, "documents of many lengths", documents, size)
    layouts = bench.size(LAYOUTS, {name: LAYOUTS[name] for name in ("zigzag", "shared-0.5%")})
    plans = [plan for sp in RANKS for plan in every_plan(documents, sp, KV_HEADS, layouts)]
    for i, plan in enumerate(plans):
        if bench.left < REST_SECONDS:
            bench.skip(PLANS, f"{len(plans) - i} of {len(plans)} were not run")
            break
        case.check(plan)
    document = np.array([0, bench.size(32768, 256)])
    longer = _Case(bench, "one document", document, size, heads=4, kv_heads=2)
    for route in ROUTES:
        longer.check(_zigzag(document, 8, route))
    for route in ROUTES:
        _bounds(bench, documents, size, route)
    _merge(bench, bench.size(4096, 64), size)


def _zigzag(cu_seqlens: np.ndarray, ranks: int, route: Route = "direct") -> SequencePlan:
    return SequencePlan(cu_seqlens, LAYOUTS["zigzag"](cu_seqlens, ranks), ranks, 1, route, "zigzag")


class _Case:
    """A packed sequence, its exact results, and the errors of one kernel call on it."""

    def __init__(
        self, bench: Bench, name: str, cu_seqlens: np.ndarray, size: int, heads: int = HEADS, kv_heads: int = KV_HEADS
    ) -> None:
        self.bench, self.name = bench, name
        self.tensors = random_tensors(int(cu_seqlens[-1]), heads, kv_heads, size, DTYPE, device=bench.device)
        self.exact = dense_results(self.tensors, cu_seqlens)
        self.of_one_kernel = self.errors(_zigzag(cu_seqlens, 1))
        bench.check(f"{name}, one kernel: out, dq, dk, dv", _worst(self.of_one_kernel), at_most=LIMITS[DTYPE])

    def errors(self, plan: SequencePlan) -> list[float]:
        """Relative error of out, dq, dk, dv."""
        return [relative_error(x, exact, LEAST) for x, exact in zip(packed_results(self.tensors, plan), self.exact)]

    def check(self, plan: SequencePlan) -> None:
        """The worst error of a plan over one kernel's."""
        ratio = _worst(error / one for error, one in zip(self.errors(plan), self.of_one_kernel))
        what = f"{self.name}, {plan.sp} ranks, Ulysses {plan.ulysses}, {plan.layout}, {plan.route}"
        self.bench.check(f"{what}: error over one kernel's", ratio, at_most=OVER_ONE_KERNEL)


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN counts as infinite."""
    return max(errors, key=lambda x: x if x == x else torch.inf)


def _bounds(bench: Bench, cu_seqlens: np.ndarray, size: int, route: Route) -> None:
    """cu_seqlens that come with a batch are the plan's, are those that kernels use, and change no result."""
    tensors = random_tensors(int(cu_seqlens[-1]), 4, 2, size, DTYPE, device=bench.device)
    without, plan = _zigzag(cu_seqlens, 4, route), _zigzag(cu_seqlens, 4, route)
    for rank in range(plan.sp):
        CallBounds(plan.rank(rank)).to(bench.device)
    calls = [call for rank in range(plan.sp) for call in plan.rank(rank).calls]
    differ = sum(not _has_its_bounds(call, bench.device) for call in calls)
    bench.check(f"bounds on the device, {route}: calls whose bounds are not the plan's", differ, at_most=0)
    exact = packed_results(tensors, without)
    worst = _worst(relative_error(x, y, LEAST) for x, y in zip(packed_results(tensors, plan), exact))
    # The order in which FlashAttention adds up dq is not fixed; a rounding of the sum to bf16 may differ, seldom.
    bench.check(f"bounds on the device, {route}: difference to results without", worst, at_most=LIMITS[DTYPE] / 10)
    made = sum(len(call.on_device) > 1 for call in calls)
    bench.check(f"bounds on the device, {route}: calls that made bounds of their own", made, at_most=0)


def _has_its_bounds(call: KernelCall, device: torch.device) -> bool:
    there = call.on_device.get(device)
    return there is not None and torch.equal(there.cpu(), torch.from_numpy(call.cu_seqlens))


def _merge(bench: Bench, length: int, size: int) -> None:
    """The merge of eight blocks' results against the same results merged in fp64."""
    q, k, v, _ = random_tensors(length, 4, 2, size, DTYPE, device=bench.device)
    runs = [Run(0, length, 0, length // 8, False)]
    blocks = list(zip(k.chunk(8), v.chunk(8)))
    alone = [attend(q, keys, values, runs) for keys, values in blocks]
    lses = torch.stack([lse for _, lse in alone]).double()
    exact = torch.stack([out for out, _ in alone]).double().mul_(lses.softmax(0).unsqueeze(-1)).sum(0)
    out, lse = attend(q, *blocks[0], runs)
    for keys, values in blocks[1:]:
        attend_(out, lse, q, keys, values, runs)
    bench.check("merge of eight blocks: out", relative_error(out, exact), at_most=MERGE_LIMIT)
    bench.check("merge of eight blocks: lse", relative_error(lse, lses.logsumexp(0)), at_most=MERGE_LIMIT)
