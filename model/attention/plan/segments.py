"""Segments of a layout, and what follows from them: each rank's work, and the keys from each rank to each other.

In: document boundaries and an assignment. Out: arrays over segments, over ranks, and over pairs of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.attention.plan.layouts import Assignment
from tokenization.compiled import compiled


class Segments(NamedTuple):
    """Maximal ranges of one document on one rank of the ring, in packed order, int64 [n] each.

    position: of the first token in its document. offset: of the first token in the rank's storage.
    """

    size: np.ndarray
    position: np.ndarray
    document: np.ndarray
    rank: np.ndarray
    offset: np.ndarray


class Traffic(NamedTuple):
    """work, local: int64 [R], pairs that each rank of the ring computes, and those over its own keys; per head.

    keys: int64 [R, R], keys that rank r receives from rank p at [r, p], when it receives exactly what it needs.
    """

    work: np.ndarray
    local: np.ndarray
    keys: np.ndarray


def cut_at_documents(cu_seqlens: np.ndarray, assignment: Assignment, ring: int) -> Segments:
    """The pieces of an assignment cut where documents begin; neighbours of one document and rank are one."""
    n_tokens = int(cu_seqlens[-1])
    cuts = np.union1d(assignment.start, cu_seqlens[:-1])
    rank = assignment.owner[np.searchsorted(assignment.start, cuts, side="right") - 1]
    document = np.searchsorted(cu_seqlens, cuts, side="right") - 1
    keep = np.r_[True, (rank[1:] != rank[:-1]) | (document[1:] != document[:-1])]
    start, rank, document = cuts[keep], rank[keep], document[keep]
    size = np.diff(start, append=n_tokens)
    by_rank = np.argsort(rank, kind="stable")
    offset = np.empty_like(start)
    offset[by_rank] = (np.cumsum(size[by_rank]) - size[by_rank]) % (n_tokens // ring)
    return Segments(size, start - cu_seqlens[document], document, rank, offset)


def traffic(segments: Segments, ring: int) -> Traffic:
    """Work and exchange of a layout. O(segments + pairs of ranks that share a document + ring^2)."""
    counted = Traffic(np.zeros(ring, np.int64), np.zeros(ring, np.int64), np.zeros((ring, ring), np.int64))
    _count(segments, counted)
    return counted


@compiled
def _count(segments: Segments, counted: Traffic) -> None:
    size, position, document, rank = segments.size, segments.position, segments.document, segments.rank
    shown = np.zeros(len(counted.work), np.int64)  # tokens of the document met so far, by rank
    last = np.zeros(len(counted.work), np.int64)  # each rank's last segment of the document
    holders = np.zeros(len(counted.work), np.int64)
    begin = 0
    while begin < len(size):
        end = begin
        while end < len(size) and document[end] == document[begin]:
            last[rank[end]] = end
            end += 1
        n_holders = 0
        for i in range(begin, end):
            r = rank[i]
            first, beyond = position[i], position[i] + size[i]
            counted.work[r] += (beyond * (beyond + 1) - first * (first + 1)) // 2
            if shown[r] == 0:
                holders[n_holders] = r
                n_holders += 1
            if last[r] == i:  # the last of its queries see every key that its others see
                for k in range(n_holders):
                    if holders[k] != r:
                        counted.keys[r, holders[k]] += shown[holders[k]]
            shown[r] += size[i]
        for k in range(n_holders):
            n = shown[holders[k]]
            counted.local[holders[k]] += n * (n + 1) // 2
            shown[holders[k]] = 0
        begin = end


@compiled
def stage_of_distance(keys: np.ndarray, tokens_per_rank: int) -> tuple[np.ndarray, int]:
    """When keys travel between ranks r and r - d, for each distance d: int64 [R] of stages, and how many there are.

    keys: of `Traffic`; tokens_per_rank: of a rank of the ring. All ranks use the same stages, so that each sends to as
    many as it receives from. A stage brings about half as many keys as a rank holds, which bounds the buffers; little
    traffic is still cut in four, so that work can go on after its first part.
    """
    ring = len(keys)
    travelling = np.zeros(ring, np.int64)
    for rank in range(ring):
        for peer in range(ring):
            travelling[(rank - peer) % ring] += keys[rank, peer]
    total, used = travelling.sum(), (travelling > 0).sum()
    n_stages = min(used, max(4, -(-2 * total // (ring * tokens_per_rank))))
    stages = np.zeros(ring, np.int64)
    before = 0
    for distance in range(1, ring):
        stages[distance] = (2 * before + travelling[distance]) * n_stages // max(1, 2 * total)
        before += travelling[distance]
    return stages, n_stages
