"""How others share a packed sequence: their layouts, and what comes of one by the cost model of our own planner.

In: document boundaries, ranks, the layer's shape, the hardware. Out: an `Outcome`, for a peer or for a layout of ours.
Every peer gets the benefit of the doubt: its messages hide behind its compute by the same formula as ours, even where
the released code waits for them, and nothing is added for kernels that meet many small blocks. All are held to the same
sums: keys are fetched again for the backward, gradients travel in the accumulator's precision.

    lwm_ring             LWM's released ring (arXiv 2310.01889, 2402.08268): contiguous chunks, all keys go round, and
                         every hop is computed for every pair, causality and documents being a mask.
    contiguous           the same ring, computing only the pairs that count.
    zigzag               a ring that computes only what counts, rank r holding chunks r and 2P-1-r of 2P (Megatron's
                         context parallelism, zigzag ring-flash-attention); documents ignored when cutting.
    per_document_zigzag  every document padded to a multiple of 2P and cut like that (TransformerEngine's packed
                         sequences, Llama 3). All keys are passed round behind the compute, or gathered before it
                         (arXiv 2407.21783, 3.3.2): whichever is faster.
    min_heap             MagiAttention's dispatch: small chunks, the costliest first, each to the rank with the least
                         work so far that has room; each rank then receives exactly the keys it needs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.mixes import useful_pairs
from model.attention.plan.cost_model import BACKWARD_OVER_FORWARD, Cost, direct_cost, relay_cost
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.layouts import Assignment, contiguous, zigzag
from model.attention.plan.segments import Traffic, cut_at_documents, traffic

MIN_HEAP_CHUNK = 512


@dataclass(frozen=True)
class Outcome:
    """One sequence shared in one way. Keys are counted in tokens' worth over all heads, as shares of S."""

    way: str
    """Layout, Ulysses degree, route."""
    work_over_mean: float
    """Pairs that the busiest rank computes, over the useful pairs of a rank on average."""
    keys: float
    """Keys that a rank receives on average, those of Ulysses' exchange of heads for tokens not among them."""
    most_keys: float
    """Keys of the rank that receives most."""
    peers: float
    """Ranks that a rank exchanges anything with, on average."""
    seconds: float
    ideal: float
    """Seconds of the useful work spread evenly, without any exchange."""


# --- Layouts of others ---


def min_heap(cu_seqlens: np.ndarray, ranks: int) -> Assignment:
    """Chunks of 512 tokens, or of an eighth of a rank's share where that is less, dealt by their work.

    A chunk's size divides a rank's share, so all ranks get equally many.
    """
    n_tokens = int(cu_seqlens[-1])
    share = n_tokens // ranks
    most = min(MIN_HEAP_CHUNK, max(1, share // 8))
    size = next(size for size in range(most, 0, -1) if share % size == 0)
    seen = np.arange(1, n_tokens + 1) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))  # keys that each query sees
    work = seen.reshape(-1, size).sum(1)
    owner = np.empty(len(work), np.int64)
    room = np.full(ranks, share // size)
    least = [(0, rank) for rank in range(ranks)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(least)
        owner[chunk] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(least, (load + int(work[chunk]), rank))
    return Assignment(np.arange(len(work)) * size, owner)


def pad_documents(cu_seqlens: np.ndarray, ranks: int) -> np.ndarray:
    """cu_seqlens of the sequence in which every document is padded at its end to a multiple of 2 * ranks."""
    chunks = 2 * ranks
    return np.concatenate([[0], np.cumsum(-(-np.diff(cu_seqlens) // chunks) * chunks)])


def per_document_zigzag(padded: np.ndarray, ranks: int) -> Assignment:
    """Rank r holds the r-th and the r-th last of 2 * ranks chunks of every document. padded: of `pad_documents`."""
    chunk = np.arange(2 * ranks)
    start = padded[:-1, None] + np.diff(padded)[:, None] // (2 * ranks) * chunk
    return Assignment(start.ravel(), np.tile(np.minimum(chunk, chunk[::-1]), len(start)))


# --- What comes of a way to share a sequence ---


def direct_outcome(
    name: str,
    cu_seqlens: np.ndarray,
    assignment: Assignment,
    ring: int,
    ulysses: int,
    shape: AttentionShape,
    hardware: Hardware,
) -> Outcome:
    """Each rank receives exactly the keys it needs from those who hold them."""
    counted = traffic(cut_at_documents(cu_seqlens, assignment, ring), ring)
    cost = direct_cost(counted, int(cu_seqlens[-1]) // ring, ulysses, shape, hardware)
    received = counted.keys.sum(1)
    talks = (counted.keys > 0) | (counted.keys.T > 0)
    return _outcome(f"{name}/{ulysses}/direct", cu_seqlens, counted, ulysses, received, talks.sum(1).mean(), cost)


def relay_outcome(
    name: str,
    cu_seqlens: np.ndarray,
    assignment: Assignment,
    ring: int,
    ulysses: int,
    shape: AttentionShape,
    hardware: Hardware,
) -> Outcome:
    """All keys go once around the ring."""
    counted = traffic(cut_at_documents(cu_seqlens, assignment, ring), ring)
    tokens = int(cu_seqlens[-1]) // ring
    cost = relay_cost(counted, tokens, ulysses, shape, hardware)
    return _outcome(
        f"{name}/{ulysses}/relay", cu_seqlens, counted, ulysses, _all_round(ring, tokens), _neighbours(ring), cost
    )


def _outcome(
    way: str, cu_seqlens: np.ndarray, counted: Traffic, ulysses: int, received: np.ndarray, peers: float, cost: Cost
) -> Outcome:
    """received: int64 [R], keys by rank of the ring, each over one u-th of the heads."""
    ring = len(counted.work)
    useful = useful_pairs(cu_seqlens)
    worth = ulysses * int(cu_seqlens[-1])
    return Outcome(
        way,
        int(counted.work.max()) * ring / useful,
        float(received.mean()) / worth,
        int(received.max()) / worth,
        float(peers) + ulysses - 1,
        cost.seconds,
        cost.ideal * useful / int(counted.work.sum()),
    )


def _all_round(ring: int, tokens: int) -> np.ndarray:
    return np.full(ring, (ring - 1) * tokens)


def _neighbours(ring: int) -> int:
    return min(2, ring - 1)


# --- Peers ---


def _lwm_ring(cu_seqlens: np.ndarray, ring: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    n_tokens = int(cu_seqlens[-1])
    tokens = n_tokens // ring
    counted = _even(ring, tokens * n_tokens, tokens * tokens)
    cost = relay_cost(counted, tokens, ulysses, shape, hardware)
    way = f"contiguous/{ulysses}/relay"
    return _outcome(way, cu_seqlens, counted, ulysses, _all_round(ring, tokens), _neighbours(ring), cost)


def _contiguous(cu_seqlens: np.ndarray, ring: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    assignment = contiguous(int(cu_seqlens[-1]), ring)
    return relay_outcome("contiguous", cu_seqlens, assignment, ring, ulysses, shape, hardware)


def _zigzag(cu_seqlens: np.ndarray, ring: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    return relay_outcome("zigzag", cu_seqlens, zigzag(int(cu_seqlens[-1]), ring), ring, ulysses, shape, hardware)


def _per_document(
    cu_seqlens: np.ndarray, ring: int, ulysses: int, shape: AttentionShape, hardware: Hardware
) -> Outcome:
    chunk = np.diff(pad_documents(cu_seqlens, ring)) // (2 * ring)
    # Chunks r and 2R-1-r of n tokens see n (2R-1) keys before them and n (n+1) / 2 pairs within each, whatever r is.
    counted = _even(ring, int((2 * ring * chunk**2 + chunk).sum()), int((chunk * (2 * chunk + 1)).sum()))
    tokens = 2 * int(chunk.sum())
    received = _all_round(ring, tokens)
    passed = relay_cost(counted, tokens, ulysses, shape, hardware)
    gathered = _gather_cost(counted, tokens, ulysses, shape, hardware)
    if passed.seconds <= gathered.seconds:
        way, peers, cost = "relay", _neighbours(ring), passed
    else:
        way, peers, cost = "gather", ring - 1, gathered
    return _outcome(f"per-document/{ulysses}/{way}", cu_seqlens, counted, ulysses, received, peers, cost)


def _gather_cost(counted: Traffic, tokens: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Cost:
    """Keys are gathered before the compute, again in the backward, and their gradients are scattered after it.

    A node takes each key in once, over all its ports, and hands it on inside.
    """
    ring = len(counted.work)
    own_node = min(ring, max(1, hardware.ranks_per_node // ulysses))
    inside = (ring - 1) * tokens / ulysses / hardware.inside
    across = (ring - own_node) * tokens / hardware.node_uplink
    latency = math.ceil(math.log2(ring)) * hardware.latency
    compute = int(counted.work.max()) * shape.flops_per_pair / ulysses / hardware.flops
    return replace(
        relay_cost(counted, tokens, ulysses, shape, hardware),
        forward=compute + max(inside, across) * shape.key_bytes + latency,
        backward=BACKWARD_OVER_FORWARD * compute
        + max(inside, across) * (shape.key_bytes + shape.gradient_bytes)
        + 2 * latency,
    )


def _min_heap(cu_seqlens: np.ndarray, ring: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    return direct_outcome("min-heap", cu_seqlens, min_heap(cu_seqlens, ring), ring, ulysses, shape, hardware)


def _even(ring: int, work: int, local: int) -> Traffic:
    """All ranks do the same. Who needs what does not matter where all keys go everywhere."""
    return Traffic(np.full(ring, work), np.full(ring, local), np.zeros((0, 0), np.int64))


PEERS: dict[str, Callable[[np.ndarray, int, int, AttentionShape, Hardware], Outcome]] = {
    "lwm_ring": _lwm_ring,
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "per_document_zigzag": _per_document,
    "min_heap": _min_heap,
}
"""By name, from (cu_seqlens, ranks of the ring, Ulysses degree, shape, hardware). Published with a degree of 1."""
