"""What packing places, in columns: whole documents, and the pieces of those that are longer than the context.

In: batches of documents in columns (`document_parquet.SCHEMA`). Out: `Examples`, an array for all that is needed of
them, and the `Window` that holds those which wait for a place in a sequence. Their tokens lie in one pool, which a
window fills from its beginning, so that nothing is allocated for a single document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from tokenization.compiled import compiled
from tokenization.packing.lineage import lineage_entries


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples in order.

    pool: int32; the tokens of example i are pool[start[i] : start[i] + length[i]]. spans: int64 [n, 2], the loss spans
    of all, in order, relative to their example; n_spans: int64 [N], how many are of each. lineage: the JSON object that
    a shard holds of each. begins: bool [N], False for a piece that is not the first of its document.
    """

    pool: np.ndarray
    start: np.ndarray
    length: np.ndarray
    spans: np.ndarray
    n_spans: np.ndarray
    lineage: pa.LargeStringArray
    begins: np.ndarray

    @classmethod
    def none(cls) -> Examples:
        """No examples."""
        numbers, spans = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
        lineage = pa.array([], pa.large_string())
        return cls(np.zeros(0, np.int32), numbers, numbers, spans, numbers, lineage, np.zeros(0, bool))

    @classmethod
    def of(cls, batch: pa.RecordBatch, row: np.ndarray, start: np.ndarray, end: np.ndarray) -> Examples:
        """Those that `pieces` gives of a batch; their tokens stay where they are."""
        tokens = batch.column("tokens")
        offset = tokens.offsets.to_numpy()[row].astype(np.int64)
        spans, n_spans = _clipped_spans(batch.column("loss_spans"), row, start, end)
        lineage = lineage_entries(batch, row, start, end)
        return cls(tokens.values.to_numpy(), offset + start, end - start, spans, n_spans, lineage, start == 0)

    def __len__(self) -> int:
        return len(self.length)

    def divided(self, count: int) -> tuple[Examples, Examples]:
        """The first `count` examples and the others, without a copy."""
        n_spans = int(self.n_spans[:count].sum())
        first = self._part(slice(count), self.spans[:n_spans])
        return first, self._part(slice(count, len(self)), self.spans[n_spans:])

    def _part(self, here: slice, spans: np.ndarray) -> Examples:
        columns = (self.n_spans[here], self.lineage[here], self.begins[here])
        return Examples(self.pool, self.start[here], self.length[here], spans, *columns)


def pieces(lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of at most `context` tokens of documents of these lengths, in order and without overlap.

    Returns int64 [N] each: the number of its document, and its range [start, end) of tokens in it. A document that
    fits, even an empty one, is one piece.
    """
    n_pieces = np.maximum(-(-lengths // context), 1)
    row = np.repeat(np.arange(len(lengths)), n_pieces)
    start = _ranges(np.zeros_like(n_pieces), n_pieces) * context
    return row, start, np.minimum(start + context, lengths[row])


class Window:
    """The examples that wait for a place in a sequence.

    Full at `most` examples, or at `most_tokens` tokens, which the last may exceed. context: tokens of the longest.
    """

    def __init__(self, most: int, most_tokens: int, context: int) -> None:
        self.most, self.most_tokens = most, most_tokens
        # Memory that is never reached is never touched, so an input that is smaller than a window costs its own size.
        self._pool = np.empty(min(most * context, most_tokens + context), np.int32)
        self._rest = Examples.none()
        self.examples = Examples.none()

    def top_up(self, further: Iterator[Examples]) -> bool:
        """Copy further examples behind those that are here until it is full; False if they end before."""
        count, tokens = len(self.examples), int(self.examples.length.sum())
        parts = [self.examples]
        while count < self.most and tokens < self.most_tokens:
            part = self._rest if len(self._rest) else next(further, None)
            if part is None:
                break
            before = np.cumsum(part.length) - part.length
            fitting = min(self.most - count, int(np.searchsorted(before, self.most_tokens - tokens)))
            part, self._rest = part.divided(fitting)
            count += fitting
            tokens += gather(part.pool, part.start, part.length, self._pool[tokens:])
            parts.append(replace(part, pool=self._pool))
        names = ("length", "spans", "n_spans", "begins")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        self._set(lineage=pa.concat_arrays([part.lineage for part in parts]), **joined)
        return count >= self.most or tokens >= self.most_tokens

    def keep(self, chosen: np.ndarray) -> None:
        """Drop all examples but those with these numbers, which ascend."""
        old = self.examples
        gather(old.pool, old.start[chosen], old.length[chosen], self._pool)
        first_span = np.cumsum(old.n_spans) - old.n_spans
        self._set(
            length=old.length[chosen],
            spans=old.spans[_ranges(first_span[chosen], old.n_spans[chosen])],
            n_spans=old.n_spans[chosen],
            lineage=old.lineage.take(pa.array(chosen)),
            begins=old.begins[chosen],
        )

    def _set(self, length: np.ndarray, **columns: Any) -> None:
        self.examples = Examples(pool=self._pool, start=np.cumsum(length) - length, length=length, **columns)


@compiled
def gather(pool: np.ndarray, start: np.ndarray, length: np.ndarray, target: np.ndarray) -> int:
    """Copy the runs of a pool one behind the other to the beginning of `target`; returns their tokens.

    The target may be the pool itself where no run moves to a higher place.
    """
    at = 0
    for run in range(len(start)):
        target[at : at + length[run]] = pool[start[run] : start[run] + length[run]]
        at += length[run]
    return at


def _clipped_spans(
    column: pa.ListArray, row: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The spans of documents as those of their pieces: int64 [n, 2], relative to the piece; int64 [N], their numbers.

    The first token of a piece is no target, since the tokens that precede it are in another piece or nowhere.
    """
    offsets = column.offsets.to_numpy().astype(np.int64)
    counts = np.diff(offsets)[row]
    low, high = (field.to_numpy()[_ranges(offsets[row], counts)] for field in column.values.flatten())
    piece = np.repeat(np.arange(len(row)), counts)
    low = np.maximum(low - start[piece], 1)
    high = np.minimum(high, end[piece]) - start[piece]
    some = low < high
    return np.column_stack([low[some], high[some]]), np.bincount(piece[some], minlength=len(row))


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """int64: count[0] numbers from start[0] on, then count[1] from start[1] on, and so forth."""
    before = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(start - before, count)
