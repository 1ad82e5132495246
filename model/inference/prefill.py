"""How new tokens of several rows enter: chunk after chunk, packed without padding, each chunk shared by the ranks.

In: how many new tokens each row has. Out: chunks, each with the plan by which the ranks share it, made as a training
sequence's is. Pure, and the same on every rank. Each row's tokens are one document of a chunk, so prompts of different
lengths, a prompt and its unconditional twin, or many questions about one prefix go in together. A chunk bounds the
activations; that the ranks share it equally costs up to P - 1 tokens of filling in a document of their own, which no
row sees and no rank keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import plan_sequence
from model.attention.plan.runs import Range
from model.attention.plan.sequence_plan import SequencePlan

PREFILL_CHUNK = 4096
"""Tokens of a rank in a chunk, at most."""
CHUNK_QUERIES = 32768
"""Tokens of all ranks in a chunk, at most, since each rank answers the queries of all."""


def chunk_tokens(ranks: int) -> int:
    """Tokens a rank of a chunk, where none are asked for."""
    return max(1, min(PREFILL_CHUNK, CHUNK_QUERIES // ranks))


class Piece(NamedTuple):
    """New tokens [start, end) of a row, counted in what it is given now."""

    row: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """Pieces of rows packed in this order, behind them what fills the chunk up; who holds which of it is the plan's."""

    pieces: tuple[Piece, ...]
    plan: SequencePlan

    @cached_property
    def held(self) -> np.ndarray:
        """int64 [P, pieces]: tokens of each piece on each rank. A rank stores them piece after piece."""
        n = len(self.pieces)
        documents = (
            np.searchsorted(self.plan.cu_seqlens, self.plan.indices(r), "right") - 1 for r in range(self.plan.sp)
        )
        return np.stack([np.bincount(document, minlength=n)[:n] for document in documents])

    def ranges(self, rank: int, pieces: Sequence[int]) -> list[Range]:
        """Where in a rank's storage its tokens of these pieces lie; without empty ranges."""
        ends = np.cumsum(self.held[rank]).tolist()
        counts = self.held[rank].tolist()
        return [(ends[i] - counts[i], ends[i]) for i in pieces if counts[i]]

    def last_tokens(self, pieces: Sequence[int]) -> list[tuple[int, int]]:
        """The rank that holds the last token of each of these pieces, and its place in that rank's storage."""
        last = self.plan.cu_seqlens[np.asarray(pieces, dtype=np.int64) + 1] - 1
        places: dict[int, tuple[int, int]] = {}
        for rank in range(self.plan.sp):
            indices = self.plan.indices(rank)
            at = np.searchsorted(indices, last)
            here = (at < len(indices)) & (indices[np.minimum(at, len(indices) - 1)] == last)
            places |= {i: (rank, int(at[i])) for i in np.flatnonzero(here).tolist()}
        return [places[i] for i in range(len(pieces))]


def plan_chunks(
    lengths: Sequence[int], tokens: int, ranks: int, shape: AttentionShape, hardware: Hardware
) -> list[Chunk]:
    """Chunks of at most `tokens` tokens a rank, that hold lengths[b] new tokens of each row b, rows in order."""
    budget = tokens * ranks
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    free = budget

    def close() -> None:
        n_tokens = budget - free
        sizes = [piece.end - piece.start for piece in pieces]
        filling = [-n_tokens % ranks] if n_tokens % ranks else []
        plan = plan_sequence(np.cumsum([0, *sizes, *filling]), ranks, ulysses=1, shape=shape, hardware=hardware)
        chunks.append(Chunk(tuple(pieces), plan))

    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + free)
            pieces.append(Piece(row, start, end))
            free -= end - start
            start = end
            if free == 0:
                close()
                pieces, free = [], budget
    if pieces:
        close()
    return chunks
