"""What each rank of the ring executes, derived from the segments of a layout.

Two rules hold for every assignment of tokens. A rank stores its tokens in ascending order of the packed sequence: its
tokens of a document are then neighbours in its storage and attend to themselves as one causal square. And a peer's keys
of a document that come before some query are a prefix of the peer's keys of that document: so one range per document
and peer is sent, and each query meets them in one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import numpy as np

from model.attention.plan.runs import Message, Range, Run, Runs, Stage, joined, joined_runs
from model.attention.plan.segments import Segments, stage_of_distance, traffic


def direct_stages(segments: Segments, ring: int, rank: int, ulysses: int) -> tuple[Runs, tuple[Stage, ...]]:
    """Runs over its own keys, and stages in which `rank` of the group receives exactly the keys it needs."""
    me, part = divmod(rank, ulysses)
    stored = int(segments.size.sum()) // ring
    stage_at, n_stages = stage_of_distance(traffic(segments, ring).keys, stored)
    fetched: dict[int, list[Range]] = {}
    served: dict[int, list[Range]] = {}
    runs: dict[int, list[Run]] = {}
    for document in _shared_documents(segments, me):
        for peer, steps in document.seen_by(me).items():
            ranges = fetched.setdefault(peer, [])
            base = sum(end - start for start, end in ranges)
            ranges.append((document.stored_at[peer], document.stored_at[peer] + steps[-1][0]))
            runs.setdefault(peer, []).extend(_runs(steps, base))
        for peer in document.shown:
            if peer != me and (count := document.needed(by=peer, of=me)):
                served.setdefault(peer, []).append((document.stored_at[me], document.stored_at[me] + count))

    stages = []
    for number in range(n_stages):
        # The nearest rank behind comes first, so that the ranks receive from different peers at any moment.
        peers = sorted((p for p in fetched if stage_at[(me - p) % ring] == number), key=lambda p: (me - p) % ring)
        readers = sorted((p for p in served if stage_at[(p - me) % ring] == number), key=lambda p: (p - me) % ring)
        receives = tuple(Message(p * ulysses + part, joined(fetched[p])) for p in peers)
        starts = np.cumsum([0, *(message.n_keys for message in receives)]).tolist()
        shifted = (
            run._replace(k_start=run.k_start + start, k_end=run.k_end + start)
            for p, start in zip(peers, starts)
            for run in runs[p]
        )
        sends = tuple(Message(p * ulysses + part, joined(served[p])) for p in readers)
        stages.append(Stage(receives, sends, joined_runs(shifted)))
    return _local_runs(segments, me, stored), tuple(stages)


def relay_stages(segments: Segments, ring: int, rank: int, ulysses: int) -> tuple[Runs, tuple[Stage, ...]]:
    """Runs over its own keys, and one stage a hop, the d-th of which brings the block of the rank d places back.

    A block is all the keys of its owner that any rank needs; it goes all the way round.
    """
    me, part = divmod(rank, ulysses)
    stored = int(segments.size.sum()) // ring
    blocks: list[list[Range]] = [[] for _ in range(ring)]
    runs: list[list[Run]] = [[] for _ in range(ring)]
    for document in _shared_documents(segments):
        seen = document.seen_by(me)
        for owner in document.shown:
            count = max((document.needed(by=reader, of=owner) for reader in document.shown), default=0)
            if count:
                base = sum(end - start for start, end in blocks[owner])
                blocks[owner].append((document.stored_at[owner], document.stored_at[owner] + count))
                runs[owner].extend(_runs(seen.get(owner, []), base))

    ahead, behind = ((me + step) % ring * ulysses + part for step in (1, -1))

    def message(peer: int, owner: int) -> tuple[Message, ...]:
        return (Message(peer, joined(blocks[owner])),)

    stages = tuple(
        Stage(message(behind, (me - hop) % ring), message(ahead, (me - hop + 1) % ring), Runs(runs[(me - hop) % ring]))
        for hop in range(1, ring)
    )
    return _local_runs(segments, me, stored), stages


class _SharedDocument:
    """One document on several ranks, as its segments in order."""

    def __init__(self, rank: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
        self.segments = list(zip(rank.tolist(), offset.tolist(), size.tolist()))
        self.stored_at: dict[int, int] = {}  # where each rank's keys of the document start in its storage
        self.shown: dict[int, int] = {}  # and how many they are
        self._after: dict[int, dict[int, int]] = {}  # keys of each rank that come before a rank's last segment
        last = {holder: i for i, (holder, _, _) in enumerate(self.segments)}
        for i, (holder, start, n) in enumerate(self.segments):
            self.stored_at.setdefault(holder, start)
            if last[holder] == i:
                self._after[holder] = dict(self.shown)
            self.shown[holder] = self.shown.get(holder, 0) + n

    def needed(self, by: int, of: int) -> int:
        """The number of one rank's keys that another needs: a prefix."""
        return 0 if by == of else self._after[by].get(of, 0)

    def seen_by(self, rank: int) -> dict[int, list[tuple[int, Range]]]:
        """By peer whose keys `rank` needs: the number of them that each range of its queries sees, ascending."""
        shown: dict[int, int] = {}
        steps: dict[int, list[tuple[int, Range]]] = {}
        for holder, start, n in self.segments:
            if holder == rank:
                for peer, count in shown.items():
                    steps.setdefault(peer, []).append((count, (start, start + n)))
            else:
                shown[holder] = shown.get(holder, 0) + n
        return steps


def _shared_documents(segments: Segments, rank: int | None = None) -> Iterator[_SharedDocument]:
    """Documents in several segments, in packed order; with `rank`, those that it holds a part of."""
    document = segments.document
    begins = np.flatnonzero(np.r_[True, document[1:] != document[:-1]])
    ends = np.r_[begins[1:], len(document)]
    wanted = ends - begins > 1
    if rank is not None:
        wanted &= np.isin(document[begins], document[segments.rank == rank])
    for begin, end in zip(begins[wanted].tolist(), ends[wanted].tolist()):
        part = slice(begin, end)
        yield _SharedDocument(segments.rank[part], segments.offset[part], segments.size[part])


def _local_runs(segments: Segments, rank: int, stored: int) -> Runs:
    mine = np.flatnonzero(segments.rank == rank)
    _, first = np.unique(segments.document[mine], return_index=True)
    bounds = np.r_[segments.offset[mine[first]], stored].tolist()
    return Runs(Run(a, b, a, b, True) for a, b in pairwise(bounds))


def _runs(steps: list[tuple[int, Range]], base: int) -> Iterator[Run]:
    """Runs over one peer's keys of a document, which start at `base`. Queries that see the same keys are neighbours."""
    for count, group in groupby(steps, key=lambda step: step[0]):
        queries = [step[1] for step in group]
        yield Run(queries[0][0], queries[-1][1], base, base + count, False)
