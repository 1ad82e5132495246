"""What a ring's attention keeps of one kernel's speed, and its operations a second, beside figures that peers publish.

In: packed sequences over many ranks. The rank with the most pairs and the one with the most kernel calls run here, one
after another, as their plan says (`stand_in.py`); the slower counts for all, as a step waits for it. Operations are
those that the documents ask for, so what a rank does too much and what waits for it counts against it; the network does
not. One kernel: a single causal call over a document of as many pairs.

Peers, whose figures have their network in them, from GPUs that compute as fast as an H200:
- ring-flash-attention keeps 75.9% of flash_attn's speed, forward and backward, on packed documents over 8 H800, in its
  best variant, the zigzag (github.com/zhuzilin/ring-flash-attention at 8996282, README: 21.4 of 28.2 iterations/s).
- MagiAttention's faster variant reaches 237 TFLOP/s a GPU forward and 264 backward on causal documents of a published
  distribution over 64 H100 (github.com/SandAI-org/MagiAttention at 2c64135, docs/source/blog/cp_benchmark.md; the bars
  of its two charts, which have no numbers, read to 1%).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.gpu.explain import check_share, explained, matrix_peak
from benchmarks.gpu.fast.stand_in import DTYPE, RankAlone, ring_of
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.timing import seconds_of
from benchmarks.mixes import document_mix, useful_pairs
from model.attention.flash_kernels import kernel_name
from model.attention.plan.cost_model import BACKWARD_OVER_FORWARD
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan

KEPT = 0.87
"""Share of one kernel's speed to keep."""
RING_FLASH = {"kept": 0.759}
MAGI = {"forward": 237.0, "backward": 264.0}
"""TFLOP/s a GPU."""
SAME = 1e-2
"""Largest relative difference between two ways to sum bf16; a wrong row lies far above."""
ROUNDS = 5
ENOUGH = 6.0
"""Seconds that a case may take."""

RING_FLASH_CUTS = ((0, 8192), (0, 256, 7648, 8192), (0, 4096, 8192), (0, 3104, 6304, 7904, 8064, 8192))
"""The document boundaries of ring-flash-attention's benchmark, for each of its GPUs."""
MAGI_LENGTHS = (
    *((1, 10, 0.2), (11, 50, 2.9), (51, 100, 5.2), (101, 200, 10.2), (201, 500, 28.2), (501, 1024, 24.6)),
    *((1025, 2048, 15.7), (2049, 4096, 7.3), (4097, 8192, 3.0), (8193, 16384, 1.3), (16385, 32768, 0.8)),
    *((32769, 65536, 0.1), (65537, 131072, 0.2), (131073, 196608, 0.1)),
)
"""MagiAttention's documents: tokens from and to, and how many of a hundred; none longer than a quarter of the whole."""


@dataclass(frozen=True)
class Case:
    """Packed sequences (cu_seqlens) over so many ranks, one layer's shape, and what a peer publishes of them.

    published: "kept", a share of one kernel's speed, or "forward" and "backward", TFLOP/s a GPU.
    """

    name: str
    sequences: tuple[np.ndarray, ...]
    ranks: int
    shape: AttentionShape
    published: Mapping[str, float]


@dataclass(frozen=True)
class Passes:
    """Of a forward and of a backward: seconds, or operations."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def both(self) -> float:
        """Of the two."""
        return self.forward + self.backward

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Passes:
        """So many of them."""
        return Passes(factor * self.forward, factor * self.backward)


@dataclass(frozen=True)
class Measured:
    """Of one rank and sequence. work: operations of its share. ring: seconds of the slower rank, which is `alone`.

    one: seconds of as much work in one causal call.
    """

    work: Passes
    ring: Passes
    one: Passes
    alone: RankAlone
    way: str


def run(bench: Bench) -> None:
    """A case at a time, in order of worth."""
    peak = matrix_peak(bench.device)
    bench.figures("device", matrix_peak_tflops=peak / 1e12, kernel=kernel_name(bench.device))
    shape = (1, 2, 64, 32)
    counted = (sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape))
    per_pair = operations(1, 2, 32)
    for name, ours, torchs in zip(MAGI, (per_pair.forward, per_pair.backward), counted):
        bench.check(f"{name} operations of a pair over torch's count", 64 * 64 * ours / torchs, at_least=1, at_most=1)
    for case in cases(bench):
        if bench.left < ENOUGH and not bench.tiny:
            bench.skip("out of time", case.name)
        else:
            _run_case(bench, case, peak)


def cases(bench: Bench) -> Iterator[Case]:
    """Real ones, or in a rehearsal the same with 128 tokens a rank and less."""
    llama3 = bench.size(AttentionShape(heads=32, kv_heads=8), AttentionShape(heads=4, kv_heads=2, head_size=16))
    magi = bench.size(AttentionShape(heads=64, kv_heads=8), AttentionShape(heads=4, kv_heads=2, head_size=16))
    some, many, tokens = bench.size((8, 64, 8192), (4, 8, 64))
    peers = tuple(np.unique(np.array(cuts) * some * tokens // 8192) for cuts in RING_FLASH_CUTS)
    yield Case("ring-flash-attention's documents", peers, some, llama3, RING_FLASH)
    drawn = tuple(_magi_documents(many * tokens, seed) for seed in range(bench.size(4, 1)))
    yield Case("MagiAttention's documents", drawn, many, magi, MAGI)
    for ranks in (some, many):
        context = 2 * ranks * tokens
        yield Case(f"LWM's mix at {context} tokens", (document_mix("lwm", context),), ranks, llama3, {})


def _magi_documents(context: int, seed: int) -> np.ndarray:
    """cu_seqlens of documents of `MAGI_LENGTHS`, each log-uniform within its bounds."""
    rng = np.random.default_rng(seed)
    often = np.array([share for *_, share in MAGI_LENGTHS])
    cuts = [0]
    while cuts[-1] < context:
        low, high, _ = MAGI_LENGTHS[rng.choice(len(often), p=often / often.sum())]
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        cuts.append(min(context, cuts[-1] + min(length, context // 4)))
    return np.array(cuts)


def operations(pairs: float, heads: int, head_size: int) -> Passes:
    """Of so many pairs of a query and a key: two matrix products forward and five backward."""
    forward = 4 * heads * head_size * pairs
    return Passes(forward, BACKWARD_OVER_FORWARD * forward)


def _run_case(bench: Bench, case: Case, peak: float) -> None:
    measured = [_measure(bench, case, cu_seqlens) for cu_seqlens in case.sequences]
    work, ring, one = (sum(parts, Passes()) for parts in zip(*((m.work, m.ring, m.one) for m in measured)))
    alone = measured[-1].alone
    bench.figures(
        case.name,
        plans=[m.way for m in measured],
        milliseconds={"forward": 1e3 * ring.forward, "backward": 1e3 * ring.backward},
        host_milliseconds=1e3 * sum(_host_seconds(m.alone, bench.device) for m in measured),
        tflops={"forward": work.forward / ring.forward / 1e12, "backward": work.backward / ring.backward / 1e12},
        one_call_tflops={"forward": work.forward / one.forward / 1e12, "backward": work.backward / one.backward / 1e12},
        share_of_peak=work.both / ring.both / peak,
        published=case.published,
    )
    for name, seconds in (("the ring", ring), ("one call", one)):
        for pass_, done, took in _by_pass(work, seconds):
            check_share(bench, f"{case.name}, {name}, {pass_}", done / took / peak)
    why = functools.cache(functools.partial(_explain, alone, case, bench.device))
    bench.goal(f"{case.name}: share of one kernel's speed", one.both / ring.both, at_least=KEPT, explain=why)
    for pass_, done, took in _by_pass(work, ring):
        if pass_ in case.published:
            what = f"{case.name}, {case.ranks} ranks: {pass_} TFLOP/s a GPU, without a network"
            bench.goal(what, done / took / 1e12, at_least=case.published[pass_], explain=why)


def _by_pass(work: Passes, seconds: Passes) -> list[tuple[str, float, float]]:
    """(name, operations, seconds) of the forward and of the backward."""
    return [("forward", work.forward, seconds.forward), ("backward", work.backward, seconds.backward)]


def _measure(bench: Bench, case: Case, cu_seqlens: np.ndarray) -> Measured:
    chosen = plan_sequence(cu_seqlens, case.ranks, shape=case.shape, hardware=Hardware())
    plan, shape = ring_of(chosen), case.shape
    heads, kv_heads = shape.heads // chosen.ulysses, shape.kv_heads // chosen.ulysses
    pairs = [plan.rank(rank).n_pairs for rank in range(plan.ring)]
    asked_for = useful_pairs(cu_seqlens)
    bench.check(f"{case.name}: pairs of all ranks over the documents'", sum(pairs) / asked_for, at_least=1, at_most=1)
    ranks = []
    for rank in sorted({pairs.index(max(pairs)), _most_runs(plan)}):
        alone = RankAlone(plan, rank, heads, kv_heads, shape.head_size, bench.device)
        bench.check(f"{case.name}, rank {rank}: difference to one block", alone.difference(), at_most=SAME)
        ranks.append((seconds_alone(alone, bench.device), alone))
    seconds, alone = max(ranks, key=lambda one: one[0].both)
    share = asked_for / plan.ring
    length = round(math.sqrt(2 * share))
    once = RankAlone(plan_sequence(np.array([0, length]), 1), 0, heads, kv_heads, shape.head_size, bench.device)
    return Measured(
        operations(share, heads, shape.head_size),
        seconds,
        # A document has a whole number of tokens, so nearly as many pairs.
        seconds_alone(once, bench.device).times(share / once.n_pairs),
        alone,
        f"{chosen.layout}/{chosen.ulysses}/{chosen.route}",
    )


def _most_runs(plan: SequencePlan) -> int:
    """The rank of the most runs, hence of the smallest."""
    runs = [sum(len(stage.runs) for stage in plan.rank(rank).stages) for rank in range(plan.ring)]
    return runs.index(max(runs))


def seconds_alone(alone: RankAlone, device: torch.device, rounds: int = ROUNDS, warm_up: int = 2) -> Passes:
    """Of its forward and its backward: medians of so many rounds."""
    forward = seconds_of(alone.forward, device, rounds, warm_up)
    out = alone.forward()
    return Passes(forward, seconds_of(lambda: alone.backward(out), device, rounds, warm_up))


def _host_seconds(alone: RankAlone, device: torch.device) -> float:
    """Seconds that the host is busy with a forward and a backward; a card, behind it, may take longer."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    alone.backward(alone.forward())
    return time.perf_counter() - started


def _explain(alone: RankAlone, case: Case, device: torch.device) -> Row:
    heads, kv_heads, tokens = alone.inputs[0].shape[1], alone.inputs[1].shape[1], len(alone.inputs[0])
    rows = 6 * heads * tokens + 6 * kv_heads * alone.n_keys  # q, out, grad, dq, keys and their gradients
    least = rows * case.shape.head_size * DTYPE.itemsize
    work = operations(alone.n_pairs, heads, case.shape.head_size)
    return explained(lambda: alone.backward(alone.forward()), device, work.both, least)
