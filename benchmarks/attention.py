"""`ringworld bench attention`: ring attention and its peers executed side by side, in processes of one thread each.

In: ranks, context, mix, shape. Out: by system the CPU seconds of every rank for one forward and backward, and the
targets beside them. All systems see the same packed sequence by turns in the same processes, over gloo:

    ours                 what the planner chooses for `PROCESSES`, the description of such a rank.
    lwm_ring             LWM's released ring (`lwm_ring.py`).
    contiguous, zigzag   those layouts in our engine, keys passed round the ring.
    per_document_zigzag  that layout in our engine, over the padded sequence; ranks receive only the keys they need,
                         where the released ones receive all.
    min_heap             that layout in our engine, ranks receiving the keys they need, as it is meant.

Seconds are a process's CPU time, its share of the exchange included, so that more ranks than cores do no harm; the
fastest round counts, after one that warms up. Results are compared between systems: none may win by being wrong.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import set_forkserver_preload
from torch.multiprocessing.spawn import start_processes

from benchmarks.lwm_ring import LwmRing
from benchmarks.machine import machine
from benchmarks.mixes import document_mix, kinds_of
from benchmarks.peers import min_heap, pad_documents, per_document_zigzag
from benchmarks.slow import SlowExchange
from model.attention.p2p import Exchange, GroupExchange
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.layouts import contiguous, zigzag
from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention
from storage.errors import UserError
from testing.reorder import dispatch

PROCESSES = Hardware(flops=50e9, inside=1e9, across=1e9, latency=1e-4)
"""A rank that is one thread of a server: what the kernel reaches in fp32, and gloo on the loopback."""
SAME = 1e-4
"""How far two systems' digests may lie apart, in units of what rounding noise as large as the result would make."""

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Settings:
    """One run. seed: of the mix and of the tensors. rounds: those that count, after one that warms up."""

    ranks: int
    context: int
    mix: str
    seed: int = 0
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 64
    rounds: int = 3

    def __post_init__(self) -> None:
        kinds_of(self.mix)
        if self.context % self.ranks:
            raise UserError(f"{self.ranks} ranks do not divide a context of {self.context} tokens")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.kv_heads} kv heads do not divide {self.heads} heads")

    @property
    def cu_seqlens(self) -> np.ndarray:
        """The packed sequence's document boundaries."""
        return document_mix(self.mix, self.context, self.seed)

    def tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, fp32 [S, heads, head size], the same in every process."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [torch.randn(self.context, n, self.head_size, generator=generator) for n in heads]

    def our_plan(self) -> SequencePlan:
        """The planner's choice."""
        shape = AttentionShape(self.heads, self.kv_heads, self.head_size, itemsize=4)
        return plan_sequence(self.cu_seqlens, self.ranks, shape=shape, hardware=PROCESSES)

    def plans(self) -> dict[str, SequencePlan]:
        """Every system's plan. That of per_document_zigzag is of the padded sequence."""
        cu_seqlens, ranks = self.cu_seqlens, self.ranks
        padded = pad_documents(cu_seqlens, ranks)
        in_chunks = contiguous(self.context, ranks)
        return {
            "ours": self.our_plan(),
            "lwm_ring": SequencePlan(cu_seqlens, in_chunks, ranks, 1, "relay", "contiguous"),
            "contiguous": SequencePlan(cu_seqlens, in_chunks, ranks, 1, "relay", "contiguous"),
            "zigzag": SequencePlan(cu_seqlens, zigzag(self.context, ranks), ranks, 1, "relay", "zigzag"),
            "per_document_zigzag": SequencePlan(
                padded, per_document_zigzag(padded, ranks), ranks, 1, "direct", "per-document"
            ),
            "min_heap": SequencePlan(cu_seqlens, min_heap(cu_seqlens, ranks), ranks, 1, "direct", "min-heap"),
        }


def attention_report(settings: Settings) -> dict:
    """Run all systems; their figures, the targets, and what was run. Raises ValueError where results differ."""
    by_rank = _in_processes(_measure, settings)
    plans = settings.plans()
    systems: dict[str, dict] = {}
    for name, plan in plans.items():
        if not _same([figures[name]["digest"] for figures in by_rank], [f["ours"]["digest"] for f in by_rank]):
            raise ValueError(f"{name} and ours computed different results")
        seconds = [figures[name]["seconds"] for figures in by_rank]
        pairs = [plan.rank(rank).n_pairs / plan.ulysses for rank in range(plan.sp)]
        systems[name] = {
            "way": f"{plan.layout}/{plan.ulysses}/{plan.route}",
            "slowest": round(max(seconds), 4),
            "mean": round(float(np.mean(seconds)), 4),
            "slowest_over_mean": round(max(seconds) / float(np.mean(seconds)), 4),
            "slowest_over_ours": round(max(seconds) / max(f["ours"]["seconds"] for f in by_rank), 3),
            "seconds_by_rank": [round(x, 4) for x in seconds],
            "pairs_by_rank": [round(x) for x in pairs],
        }
    systems["lwm_ring"]["pairs_by_rank"] = [settings.context**2 // settings.ranks] * settings.ranks
    where = f"{settings.mix} {settings.context}/{settings.ranks} seed {settings.seed}"
    targets = (
        ("ours: CPU seconds, slowest over mean, at most", 1.10, systems["ours"]["slowest_over_mean"]),
        ("lwm_ring: slowest rank over ours, at least", 5.0, systems["lwm_ring"]["slowest_over_ours"]),
        ("zigzag: slowest rank over ours, at least", 1.3, systems["zigzag"]["slowest_over_ours"]),
    )
    return {
        "benchmark": "attention",
        "settings": asdict(settings) | {"hardware": asdict(PROCESSES)},
        "documents": len(settings.cu_seqlens) - 1,
        "machine": machine(),
        "claims": [
            {
                "claim": claim,
                "where": where,
                "target": target,
                "measured": measured,
                "met": measured <= target if claim.endswith("at most") else measured >= target,
            }
            for claim, target, measured in targets
        ],
        "systems": systems,
    }


def overlap_report(settings: Settings, added: float) -> dict:
    """Wall seconds of a step of ours as it is, and with `added` seconds more for a rank's exchange in all.

    Medians over the rounds; a step takes as long as its slowest rank. How much it grows is the median over pairs of
    neighbouring rounds, since a machine that does other work is slow for longer than a round.
    Raises UserError where ranks would have to share cores, since wall time then says nothing.
    """
    cores = int(machine()["cores"])
    if settings.ranks > cores:
        raise UserError(f"--slow-exchange needs a core a rank: {settings.ranks} ranks, {cores} cores")
    if added <= 0:
        raise UserError(f"--slow-exchange {added:g} is not a number of seconds above 0")
    by_rank = _in_processes(_measure_overlap, settings, added)
    seconds, slowed = (np.max([figures[key] for figures in by_rank], axis=0) for key in ("seconds", "seconds_slowed"))
    growth = float(np.median(slowed - seconds)) / added
    plan = settings.our_plan()
    return {
        "benchmark": "overlap",
        "settings": asdict(settings) | {"hardware": asdict(PROCESSES)},
        "machine": machine(),
        "way": f"{plan.layout}/{plan.ulysses}/{plan.route}",
        "added": added,
        "seconds": round(float(np.median(seconds)), 4),
        "seconds_slowed": round(float(np.median(slowed)), 4),
        "growth_by_round": np.round(slowed - seconds, 4).tolist(),
        "exchanges_by_rank": [figures["exchanges"] for figures in by_rank],
        "claims": [
            {
                "claim": "step: growth over what was added, less than",
                "where": f"{settings.mix} {settings.context}/{settings.ranks} seed {settings.seed}",
                "target": 0.5,
                "measured": round(growth, 4),
                "met": growth < 0.5,
            }
        ],
    }


# --- In the processes ---


def _in_processes(function: Callable[..., dict], settings: Settings, *more: Any) -> list[dict]:
    """`function(exchange, settings, *more)` in one process a rank: the results by rank."""
    set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, folder, settings, *more)
        start_processes(_process, args=arguments, nprocs=settings.ranks, start_method="forkserver")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(settings.ranks)]


def _process(rank: int, function: Callable[..., dict], folder: str, settings: Settings, *more: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.ranks)
    assert dist.group.WORLD is not None
    figures = function(GroupExchange(dist.group.WORLD), settings, *more)
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _measure(exchange: Exchange, settings: Settings) -> dict:
    """This rank's CPU seconds and the digest of its results, by system."""
    sequence = settings.tensors()
    ready: dict[str, tuple[Step, list[Tensor]]] = {}
    for name, plan in settings.plans().items():
        tensors = sequence
        if plan.n_tokens > settings.context:
            tensors = [_padded(x, settings.cu_seqlens, plan.cu_seqlens) for x in sequence]
        rows = [dispatch(x, plan, exchange.rank) for x in tensors]
        step = LwmRing(exchange, plan).forward_backward if name == "lwm_ring" else _packed(exchange, plan)
        ready[name] = step, rows
    figures: dict[str, dict] = {name: {"digest": _digest(step(*rows), rows)} for name, (step, rows) in ready.items()}
    for _ in range(settings.rounds):  # by turns, so that whatever else the machine does meets all systems
        for name, (step, rows) in ready.items():
            dist.barrier()
            started = time.process_time()
            step(*rows)
            seconds = time.process_time() - started
            figures[name]["seconds"] = min(seconds, figures[name].get("seconds", seconds))
    return figures


def _measure_overlap(exchange: Exchange, settings: Settings, added: float) -> dict:
    """Wall seconds by round, as it is and slowed, and how many exchanges bring this rank anything."""
    plan = settings.our_plan()
    rows = [dispatch(x, plan, exchange.rank) for x in settings.tensors()]
    slow = SlowExchange(exchange)
    _packed(slow, plan)(*rows)
    counted, slow.seconds_per_byte = slow.exchanges, added / max(1, slow.bytes_received)
    seconds: Mapping[str, list[float]] = {"seconds": [], "seconds_slowed": []}
    for _ in range(settings.rounds):  # by turns, so that whatever else the machine does meets both
        for name, way in (("seconds", exchange), ("seconds_slowed", slow)):
            dist.barrier()
            started = time.perf_counter()
            _packed(way, plan)(*rows)
            seconds[name].append(time.perf_counter() - started)
    return {**seconds, "exchanges": counted}


def _packed(exchange: Exchange, plan: SequencePlan) -> Step:
    """Forward and backward of our engine: [out, dq, dk, dv] from q, k, v and the gradient of out."""

    def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = packed_ring_attention(q, k, v, plan, exchange)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    return step


def _padded(x: Tensor, cu_seqlens: np.ndarray, padded: np.ndarray) -> Tensor:
    """The packed rows where the padded documents have them, zeros elsewhere."""
    lengths = np.diff(cu_seqlens)
    at = np.arange(cu_seqlens[-1]) + np.repeat(padded[:-1] - cu_seqlens[:-1], lengths)
    wide = x.new_zeros(int(padded[-1]), *x.shape[1:])
    wide[torch.from_numpy(at)] = x
    return wide


def _digest(results: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[float]]:
    """[product with random rows, squared norm] of out, dq, dk, dv. Sums over ranks do not depend on who holds what.

    Padding has rows of zeros, so only real tokens count; what it adds to the norm serves as a scale alone.
    """
    q, k, v, grad = rows
    pairs = zip(results, (q, grad, v, k))
    return [[float((x.double() * y.double()).sum()), float(x.double().square().sum())] for x, y in pairs]


def _same(digests: Sequence[list[list[float]]], reference: Sequence[list[list[float]]]) -> bool:
    """Whether two systems computed the same, by the sums of their ranks' digests."""
    found, expected = (np.sum(np.array(x), axis=0) for x in (digests, reference))
    return bool((np.abs(found - expected)[:, 0] <= SAME * np.sqrt(expected[:, 1])).all())
