"""`ringworld bench kernels`: what cutting attention into blocks costs on a GPU, beside one call of the same work.

In: contexts, ranks, a mix, the layer's shape. Out: for the rank with the most work in the planner's plan, seconds of
all its block calls, forward plus backward, without any exchange; seconds of one causal call over a single document of
as many pairs; operations a second of both, and the blocks' share of the card's measured matrix peak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.mixes import document_mix
from model.attention.flash_kernels import accumulator_dtype, attend, attend_, attend_backward_, cuda_kernel
from model.attention.plan.cost_model import BACKWARD_OVER_FORWARD
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import plan_sequence
from model.attention.plan.runs import RankPlan, Run, Runs
from model.attention.plan.segments import traffic
from model.attention.plan.sequence_plan import SequencePlan
from storage.errors import UserError

TARGET = 1.15
"""All block calls over the one ideal call: what the cut may cost."""
PEAK_SIZE = 8192


def kernels_report(
    contexts: Sequence[int], ranks: int, mix: str, seed: int, shape: AttentionShape, hardware: Hardware
) -> dict:
    """One row for each context. Raises UserError where there is no CUDA device or the ranks do not divide a context."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: run `ringworld bench kernels` on a machine with an NVIDIA GPU")
    for context in contexts:
        if context % ranks:
            raise UserError(f"{ranks} ranks do not divide a context of {context} tokens")
    device = torch.device("cuda")
    peak = matrix_peak(device)
    rows = []
    for context in contexts:
        plan = plan_sequence(document_mix(mix, context, seed), ranks, shape=shape, hardware=hardware)
        rows.append({"context": context, **block_costs(plan, shape, device, torch.bfloat16, peak)})
    return {
        "benchmark": "kernels",
        "settings": {"ranks": ranks, "mix": mix, "seed": seed, "shape": asdict(shape)},
        "machine": {**machine(), "gpu": torch.cuda.get_device_name(), "kernel": cuda_kernel()},
        "matrix_peak_tflops": peak / 1e12,
        "target": TARGET,
        "rows": rows,
    }


def block_costs(
    plan: SequencePlan, shape: AttentionShape, device: torch.device, dtype: torch.dtype, peak: float
) -> dict:
    """Seconds of the busiest rank's block calls and of the one ideal call, and what follows from them."""
    work = traffic(plan.segments, plan.ring).work
    rank_plan = plan.rank(int(work.argmax()) * plan.ulysses)
    heads, kv_heads = shape.heads // plan.ulysses, shape.kv_heads // plan.ulysses
    pairs = rank_plan.n_pairs
    length = round(math.sqrt(2 * pairs))
    ideal = RankPlan(length, "direct", Runs([Run(0, length, 0, length, True)]), ())
    operations = 4 * heads * shape.head_size * (1 + BACKWARD_OVER_FORWARD)
    blocks_s = _seconds(_forward_backward(rank_plan, heads, kv_heads, shape.head_size, device, dtype), device)
    ideal_s = _seconds(_forward_backward(ideal, heads, kv_heads, shape.head_size, device, dtype), device)
    return {
        "layout": plan.layout,
        "ulysses": plan.ulysses,
        "pairs": pairs,
        "stages": len(rank_plan.stages),
        "runs": len(rank_plan.local) + sum(len(stage.runs) for stage in rank_plan.stages),
        "blocks_seconds": blocks_s,
        "ideal_seconds": ideal_s,
        # The ideal document has a whole number of tokens, so nearly as many pairs.
        "blocks_over_ideal": blocks_s / pairs / (ideal_s / ideal.n_pairs),
        "blocks_tflops": pairs * operations / blocks_s / 1e12,
        "ideal_tflops": ideal.n_pairs * operations / ideal_s / 1e12,
        "blocks_share_of_peak": pairs * operations / blocks_s / peak,
    }


def matrix_peak(device: torch.device) -> float:
    """Operations a second of one large bf16 matrix product."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * PEAK_SIZE**3 / _seconds(lambda: a @ b, device)


def _forward_backward(
    plan: RankPlan, heads: int, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """All block calls of one rank on random blocks; results are made and dropped."""

    def rows(n: int, *shape: int) -> Tensor:
        return torch.randn(n, *shape, head_size, device=device, dtype=dtype)

    q, grad = rows(plan.n_tokens, heads), rows(plan.n_tokens, heads)
    own = rows(plan.n_tokens, 2, kv_heads)
    others = [(rows(stage.n_keys, 2, kv_heads), stage.runs) for stage in plan.stages if stage.runs]

    def run() -> None:
        keys, values = own.unbind(1)
        out, lse = attend(q, keys, values, plan.local)
        for kv, runs in others:
            keys, values = kv.unbind(1)
            attend_(out, lse, q, keys, values, runs)
        rounded = out.to(dtype)
        dq = torch.zeros_like(q, dtype=accumulator_dtype(dtype))
        for kv, runs in [(own, plan.local), *others]:
            (keys, values), (dk, dv) = kv.unbind(1), torch.zeros_like(kv, dtype=dq.dtype).unbind(1)
            attend_backward_(dq, dk, dv, grad, q, keys, values, rounded, lse, runs)

    return run


def _seconds(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median seconds of a call after two that warm up, by the device's own clock."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return sorted(taken)[rounds // 2]
