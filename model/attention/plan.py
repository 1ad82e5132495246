"""The plan of one packed sequence: who holds which tokens, who sends which keys to whom, what each kernel call sees.

In: `cu_seqlens` and a layout. Out: a `SequencePlan`, small and picklable, made on the host once per batch; each rank
derives its own `RankPlan` from it. All pure functions, so every rank comes to the same plan without talking.

Two rules keep the rest simple, and hold for every assignment of tokens to ranks. A rank stores its tokens in
ascending order of the packed sequence: its tokens of a document are then neighbours in its storage, and what it holds
of a document attends to itself as one causal square. And a peer's keys of a document that come before some query are
a prefix of the peer's keys of that document: so one range per document and peer is fetched, and each query meets
a peer's keys in at most one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from model.attention.layouts import LAYOUTS

Range = tuple[int, int]
Array = TypeVar("Array")


class Run(NamedTuple):
    """One rectangle or triangle of attention: queries [q_start, q_end) over keys [k_start, k_end), never empty.

    Queries are counted in the rank's storage; keys in the storage of the source, or in the keys received from it. A
    causal run is square: its i-th query sees its first i + 1 keys. Otherwise every query sees every key.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: bool


@dataclass(frozen=True)
class Fetch:
    """Keys received from one peer: ranges of the peer's storage, joined in this order, and the runs over them."""

    peer: int
    ranges: tuple[Range, ...]
    runs: tuple[Run, ...]

    @property
    def n_keys(self) -> int:
        """Keys received."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True)
class Serve:
    """Keys a rank sends to one peer: ranges of its own storage, equal to the `ranges` of the peer's fetch from it."""

    peer: int
    ranges: tuple[Range, ...]

    @property
    def n_keys(self) -> int:
        """Keys sent."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True)
class RankPlan:
    """What one rank does: runs over its own keys, then its fetches in the order their keys are used; and its serves."""

    rank: int
    n_tokens: int
    local: tuple[Run, ...]
    fetches: tuple[Fetch, ...]
    serves: tuple[Serve, ...]

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key that this rank computes: its work, per head."""
        runs = [*self.local, *(run for fetch in self.fetches for run in fetch.runs)]
        sizes = [(run.q_end - run.q_start, run.k_end - run.k_start, run.causal) for run in runs]
        return sum(n * (n + 1) // 2 if causal else n * m for n, m, causal in sizes)


class _Segments(NamedTuple):
    """Maximal ranges of one document on one rank, in packed order, int64 [n]; `offset` is in the rank's storage."""

    start: np.ndarray
    size: np.ndarray
    document: np.ndarray
    rank: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Who holds which tokens of one packed sequence.

    cu_seqlens: int64 [n_documents + 1], from 0 to S. pieces: for each rank an int64 [n, 2] array of half-open ranges of
    the packed sequence, ascending; together they hold every token once, and each rank the same number. Raises
    ValueError where they do not.
    """

    cu_seqlens: np.ndarray
    pieces: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        if len(self.cu_seqlens) < 2 or self.cu_seqlens[0] != 0 or (np.diff(self.cu_seqlens) <= 0).any():
            raise ValueError("cu_seqlens does not ascend from 0 without empty documents")
        table = np.concatenate(self.pieces)
        table = table[np.argsort(table[:, 0], kind="stable")]
        tiles = (table[1:, 0] == table[:-1, 1]).all() and (table[:, 0] < table[:, 1]).all()
        if not (tiles and table[0, 0] == 0 and table[-1, 1] == self.cu_seqlens[-1]):
            raise ValueError("the pieces of all ranks do not hold every token exactly once")
        if any((np.diff(piece[:, 0]) <= 0).any() for piece in self.pieces):
            raise ValueError("the pieces of a rank are not in ascending order")
        if len({int((piece[:, 1] - piece[:, 0]).sum()) for piece in self.pieces}) > 1:
            raise ValueError("the ranks do not hold equally many tokens")

    @property
    def sp(self) -> int:
        """Ranks that share the sequence."""
        return len(self.pieces)

    @property
    def n_tokens(self) -> int:
        """S, tokens of the packed sequence."""
        return int(self.cu_seqlens[-1])

    @property
    def tokens_per_rank(self) -> int:
        """T = S / sp."""
        return self.n_tokens // self.sp

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [S]: each token's position in its document, from 0."""
        return np.arange(self.n_tokens) - np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))

    def indices(self, rank: int) -> np.ndarray:
        """int64 [T]: positions in the packed sequence of what `rank` holds, ascending, which is its storage order."""
        return np.concatenate([np.arange(start, end) for start, end in self.pieces[rank]])

    def rank(self, rank: int) -> RankPlan:
        """The part of the plan that `rank` executes; derived at the first call, then remembered."""
        if rank not in self._rank_plans:
            self._rank_plans[rank] = _rank_plan(self, rank)
        return self._rank_plans[rank]

    @cached_property
    def _rank_plans(self) -> dict[int, RankPlan]:
        return {}

    @cached_property
    def _segments(self) -> _Segments:
        table = np.concatenate(self.pieces)
        owner = np.repeat(np.arange(self.sp), [len(piece) for piece in self.pieces])
        order = np.argsort(table[:, 0])
        starts, owner = table[order, 0], owner[order]
        cuts = np.union1d(starts, self.cu_seqlens[:-1])
        rank = owner[np.searchsorted(starts, cuts, side="right") - 1]
        document = np.searchsorted(self.cu_seqlens, cuts, side="right") - 1
        # Neighbouring pieces of one rank are one segment as long as the document goes on.
        keep = np.r_[True, (rank[1:] != rank[:-1]) | (document[1:] != document[:-1])]
        start, rank, document = cuts[keep], rank[keep], document[keep]
        size = np.diff(np.r_[start, self.n_tokens])
        offset = np.empty_like(start)
        by_rank = np.argsort(rank, kind="stable")
        offset[by_rank] = (np.cumsum(size[by_rank]) - size[by_rank]) % self.tokens_per_rank
        return _Segments(start, size, document, rank, offset)


def plan_sequence(cu_seqlens: np.ndarray, sp: int, layout: str = "zigzag") -> SequencePlan:
    """Plan a packed sequence over `sp` ranks.

    cu_seqlens: integers [n_documents + 1], document boundaries from 0 to S. layout: "contiguous" or "zigzag". Raises
    ValueError on an unknown layout, on boundaries that do not ascend from 0, and where S does not divide into sp equal
    chunks (contiguous) or 2 * sp (zigzag); on one rank every length will do.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if sp < 1:
        raise ValueError(f"a sequence cannot be shared by {sp} ranks")
    boundaries = np.asarray(cu_seqlens, dtype=np.int64)
    if len(boundaries) < 2:
        raise ValueError("cu_seqlens names no document")
    assign = LAYOUTS["contiguous" if sp == 1 else layout]
    return SequencePlan(boundaries, tuple(assign(int(boundaries[-1]), sp)))


def dispatch(array: Array, plan: SequencePlan, rank: int) -> Array:
    """The rows of a packed sequence that `rank` holds, in storage order: array or tensor, [S, ...] to [T, ...]."""
    return array[plan.indices(rank)]  # type: ignore[index]


def gather(parts: list[np.ndarray], plan: SequencePlan) -> np.ndarray:
    """The inverse of `dispatch`: one [T, ...] array a rank, in rank order, back to packed order [S, ...]."""
    joined = np.concatenate(parts)
    packed = np.empty_like(joined)
    packed[np.concatenate([plan.indices(rank) for rank in range(plan.sp)])] = joined
    return packed


def _rank_plan(plan: SequencePlan, rank: int) -> RankPlan:
    segments = plan._segments
    mine = np.flatnonzero(segments.rank == rank)
    documents, first = np.unique(segments.document[mine], return_index=True)
    storage = np.r_[segments.offset[mine[first]], plan.tokens_per_rank].tolist()
    local = tuple(Run(a, b, a, b, True) for a, b in pairwise(storage))

    # Only documents cut into several segments can have keys elsewhere.
    begins = np.searchsorted(segments.document, documents, side="left")
    ends = np.searchsorted(segments.document, documents, side="right")
    fetched: dict[int, list[Range]] = {}
    served: dict[int, list[Range]] = {}
    runs: dict[int, list[Run]] = {}
    for begin, end in zip(begins.tolist(), ends.tolist()):
        if end - begin > 1:
            _plan_document(segments, begin, end, rank, fetched, served, runs)

    # The nearest rank behind first: at any moment the ranks then ask different peers.
    def by_distance(peer: int) -> int:
        return (rank - peer) % plan.sp

    return RankPlan(
        rank=rank,
        n_tokens=plan.tokens_per_rank,
        local=local,
        fetches=tuple(Fetch(p, joined(fetched[p]), tuple(runs[p])) for p in sorted(fetched, key=by_distance)),
        serves=tuple(Serve(p, joined(served[p])) for p in sorted(served)),
    )


def _plan_document(
    segments: _Segments,
    begin: int,
    end: int,
    rank: int,
    fetched: dict[int, list[Range]],
    served: dict[int, list[Range]],
    runs: dict[int, list[Run]],
) -> None:
    """Add one document's needs and duties: walk its segments in order, counting the keys each rank has shown so far."""
    storage: dict[int, int] = {}  # where each rank's keys of the document start in its storage
    shown: dict[int, int] = {}  # how many of them came so far
    steps: dict[int, list[tuple[int, Range]]] = {}  # per peer: keys seen, by which queries
    serve: dict[int, Range] = {}
    for i in range(begin, end):
        holder, offset, size = int(segments.rank[i]), int(segments.offset[i]), int(segments.size[i])
        storage.setdefault(holder, offset)
        if holder == rank:
            for peer, count in shown.items():
                if peer != rank:
                    steps.setdefault(peer, []).append((count, (offset, offset + size)))
        elif rank in shown:
            serve[holder] = (storage[rank], storage[rank] + shown[rank])
        shown[holder] = shown.get(holder, 0) + size

    for peer, seen in steps.items():
        ranges = fetched.setdefault(peer, [])
        base = sum(b - a for a, b in ranges)
        ranges.append((storage[peer], storage[peer] + seen[-1][0]))
        # Queries that see the same keys are neighbours in storage: one run.
        for count, group in groupby(seen, key=lambda step: step[0]):
            queries = [step[1] for step in group]
            runs.setdefault(peer, []).append(Run(queries[0][0], queries[-1][1], base, base + count, False))
    for peer, keys in serve.items():
        served.setdefault(peer, []).append(keys)


def joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The same tokens in fewer ranges: each that begins where the one before it ends is made one with it."""
    merged: list[Range] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
