"""Documents to packed sequences: splits long documents, fills contexts to the brim, weights each token, shuffles.

In: batches of documents in columns, in a fixed order. Out: a stream of `PackedSequence`s, each exactly one context
long. One window of documents, bounded in documents and in tokens, is in memory at a time. Sequences are filled from it
until half of it is left (`subset_sum`), and that half is topped up to a window again: with thousands of documents to
choose from, only a few tokens in ten thousand are wasted. The output does not depend on what has not yet been read.
Long documents are placed first; the sequences of a window and the documents within a sequence are shuffled to undo
that.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.document import Document, PackedSequence
from tokenization.packing.best_fit import best_fit
from tokenization.packing.examples import Examples, Window, pieces
from tokenization.packing.loss_weights import objective_modalities
from tokenization.packing.sequences import sequences
from tokenization.packing.subset_sum import fill_from
from tokenization.permutation import derive_key, permute
from tokenization.shards.document_parquet import to_batch
from tokenization.vocabulary import JointVocabulary

WINDOW = 10_000
WINDOW_TOKENS = 1 << 28
KEPT = 2  # at most 1 / KEPT of a window, in documents and in tokens, is kept for the next
_OBJECTS = 64  # documents of `pack` that are put in columns at once
TOO_SHORT = "shorter than 2 tokens, so nothing to predict"


@dataclass
class PackCounts:
    """Counts of the input and output of `pack_batches`, updated while it runs."""

    documents: int = 0
    split: int = 0
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def pack(
    documents: Iterable[Document], context: int, vocabulary: JointVocabulary, objective: str, **options: Any
) -> Iterator[PackedSequence]:
    """Pack documents that are objects as `pack_batches` packs them in columns, with its options."""
    objects = iter(documents)
    batches = map(to_batch, iter(lambda: list(itertools.islice(objects, _OBJECTS)), []))
    return pack_batches(batches, context, vocabulary, objective, **options)


def pack_batches(
    batches: Iterable[pa.RecordBatch],
    context: int,
    vocabulary: JointVocabulary,
    objective: str,
    *,
    window: int = WINDOW,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
    key_prefix: str = "",
    counts: PackCounts | None = None,
) -> Iterator[PackedSequence]:
    """Pack documents into sequences of exactly `context` tokens, keyed `{key_prefix}{number:08d}`.

    batches: of `document_parquet.SCHEMA`; how documents are cut into batches makes no difference. A window is full at
    `window` examples or `window_tokens` tokens (4 bytes each), including those kept from the window before.

    Documents longer than the context are split: the key of a piece is `key@start`, its provenance gains
    `document_range` = [start, end) in tokens of the document, and its first token is no target. Documents and last
    pieces of fewer than 2 tokens are left out and counted in `counts.skipped`. Unfilled room is one last run of token 0
    with weight 0, which `cu_seqlens` bounds like a document but which is no example. Raises ValueError on a context
    under 2, UserError as `loss_weights` does.
    """
    objective_modalities(objective)
    if context < 2:
        raise ValueError(f"context {context} has room for no target: at least 2 tokens are needed")
    counts = PackCounts() if counts is None else counts
    keys = (f"{key_prefix}{serial:08d}" for serial in itertools.count())
    examples = _examples(batches, context, counts)
    waiting = Window(window, window_tokens, context)
    for number in itertools.count():
        is_last = not waiting.top_up(examples)
        keep = (0, 0) if is_last else (window // KEPT, window_tokens // KEPT)
        groups, kept = _groups(waiting.examples.length, context, derive_key(seed, number), *keep)
        for sequence in sequences(waiting.examples, groups, keys, context, vocabulary, objective):
            counts.sequences += 1
            yield sequence
        if is_last:
            return
        waiting.keep(kept)


def pack_window(lengths: np.ndarray, context: int, keep: int, keep_tokens: int) -> tuple[np.ndarray, int]:
    """The sequences of a window's examples and their number, as by `fill_from` with these arguments.

    If none are to be kept, no more sequences are made than by best-fit-decreasing.
    """
    sequence_of, n_sequences = fill_from(lengths, context, keep, keep_tokens)
    if keep or keep_tokens:
        return sequence_of, n_sequences
    return min((sequence_of, n_sequences), best_fit(lengths, context), key=lambda packed: packed[1])


def filled(sequence: PackedSequence) -> int:
    """The number of tokens that belong to documents: all but the trailing padding run."""
    return int(sequence.cu_seqlens[sequence.n_examples])


def _examples(batches: Iterable[pa.RecordBatch], context: int, counts: PackCounts) -> Iterator[Examples]:
    for batch in batches:
        lengths = pc.list_value_length(batch.column("tokens")).to_numpy().astype(np.int64)
        row, start, end = pieces(lengths, context)
        usable = end - start >= 2
        examples = Examples.of(batch, row[usable], start[usable], end[usable])
        counts.documents += len(lengths)
        counts.split += int(np.count_nonzero(lengths > context))
        counts.examples += len(examples)
        counts.tokens += int(examples.length.sum())
        if not usable.all():
            counts.skipped[TOO_SHORT] += int(np.count_nonzero(~usable))
        yield examples


def _groups(
    lengths: np.ndarray, context: int, key: np.ndarray, keep: int, keep_tokens: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The examples of each sequence of a window, both shuffled; and those kept for the next window, in order."""
    sequence_of, n_sequences = pack_window(lengths, context, keep, keep_tokens)
    placed = np.flatnonzero(sequence_of >= 0)
    place = permute(np.arange(n_sequences), n_sequences, derive_key(0) ^ key)[sequence_of[placed]]
    member_place = permute(placed, len(lengths), derive_key(1) ^ key)
    order = np.lexsort((member_place, place))
    ends = np.flatnonzero(np.diff(place[order])) + 1
    members, bounds = placed[order], [0, *ends.tolist(), len(placed)]
    groups = [members[start:end] for start, end in itertools.pairwise(bounds) if end > start]
    return groups, np.flatnonzero(sequence_of < 0)
