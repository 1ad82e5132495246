"""Documents to packed sequences: splits long documents, fills contexts to the brim, weights each token, shuffles.

In: a stream of documents in a fixed order. Out: a stream of `PackedSequence`s, each exactly one context long.
One window of documents, bounded in documents and in tokens, is in memory at a time. Sequences are filled from it until
half of it is left (`subset_sum`), and that half is topped up to a window again: with thousands of documents to choose
from, only a few tokens in ten thousand are wasted. The output does not depend on what has not yet been read. Long
documents are placed first; the sequences of a window and the documents within a sequence are shuffled to undo that.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tokenization.document import Document, PackedSequence
from tokenization.packing.best_fit import best_fit
from tokenization.packing.loss_weights import loss_weights, objective_modalities
from tokenization.packing.subset_sum import fill_from
from tokenization.permutation import derive_key, permute
from tokenization.vocabulary import JointVocabulary

WINDOW = 10_000
WINDOW_TOKENS = 1 << 28
KEPT = 2  # at most 1 / KEPT of a window, in documents and in tokens, is kept for the next
TOO_SHORT = "shorter than 2 tokens, so nothing to predict"
PAD_ID = 0


@dataclass
class PackCounts:
    """Counts of the input and output of `pack`, updated while it runs."""

    documents: int = 0
    split: int = 0
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def split_document(document: Document, context: int) -> list[Document]:
    """The document itself, or its pieces of at most `context` tokens, in order and without overlap.

    The key of a piece is `key@start`, its provenance gains `document_range` = [start, end) in tokens of the document.
    The first token of a piece is no target, since the tokens that precede it are in another piece.
    """
    if len(document) <= context:
        return [document]
    pieces = []
    for start in range(0, len(document), context):
        end = min(start + context, len(document))
        spans = ((max(low - start, 1), min(high, end) - start) for low, high in document.loss_spans)
        pieces.append(
            replace(
                document,
                key=f"{document.key}@{start}",
                tokens=document.tokens[start:end],
                loss_spans=tuple((low, high) for low, high in spans if low < high),
                provenance={**document.provenance, "document_range": [start, end]},
            )
        )
    return pieces


def pack(
    documents: Iterable[Document],
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

    A window is full at `window` examples or `window_tokens` tokens (4 bytes each), including those kept from the window
    before. Documents longer than the context are split; documents and last pieces of fewer than 2 tokens are left out
    and counted in `counts.skipped`. Unfilled room is one last run of token 0 with weight 0, which `cu_seqlens` bounds
    like a document but which is no example. Raises ValueError on a context under 2, UserError as `loss_weights` does.
    """
    objective_modalities(objective)
    if context < 2:
        raise ValueError(f"context {context} has room for no target: at least 2 tokens are needed")
    counts = PackCounts() if counts is None else counts
    examples = _examples(documents, context, counts)
    serial = itertools.count()
    members: list[Document] = []
    for number in itertools.count():
        is_last = not _top_up(members, examples, window, window_tokens)
        keep = (0, 0) if is_last else (window // KEPT, window_tokens // KEPT)
        groups, members = _groups(members, context, derive_key(seed, number), *keep)
        for group in groups:
            counts.sequences += 1
            yield _sequence(f"{key_prefix}{next(serial):08d}", group, context, vocabulary, objective)
        if is_last:
            return


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


def _examples(documents: Iterable[Document], context: int, counts: PackCounts) -> Iterator[Document]:
    for document in documents:
        counts.documents += 1
        pieces = split_document(document, context)
        counts.split += len(pieces) > 1
        for piece in pieces:
            if len(piece) < 2:
                counts.skipped[TOO_SHORT] += 1
                continue
            counts.examples += 1
            counts.tokens += len(piece)
            yield piece


def _top_up(members: list[Document], examples: Iterator[Document], window: int, window_tokens: int) -> bool:
    """Add examples until the window is full; returns False if they end before."""
    tokens = sum(map(len, members))
    while len(members) < window and tokens < window_tokens:
        example = next(examples, None)
        if example is None:
            return False
        members.append(example)
        tokens += len(example)
    return True


def _groups(
    members: list[Document], context: int, key: np.ndarray, keep: int, keep_tokens: int
) -> tuple[list[list[Document]], list[Document]]:
    """The sequences of a window, shuffled, each of shuffled documents; and the documents kept for the next window."""
    lengths = np.array([len(member) for member in members], dtype=np.int64)
    sequence_of, n_sequences = pack_window(lengths, context, keep, keep_tokens)
    placed = np.flatnonzero(sequence_of >= 0)
    place = permute(np.arange(n_sequences), n_sequences, derive_key(0) ^ key)[sequence_of[placed]]
    member_place = permute(np.arange(len(members)), len(members), derive_key(1) ^ key)[placed]
    order = np.lexsort((member_place, place))
    ends = np.flatnonzero(np.diff(place[order])) + 1
    groups = [[members[index] for index in chosen] for chosen in np.split(placed[order], ends) if len(chosen)]
    return groups, [members[index] for index in np.flatnonzero(sequence_of < 0)]


def _sequence(
    key: str, group: list[Document], context: int, vocabulary: JointVocabulary, objective: str
) -> PackedSequence:
    boundaries = np.cumsum([0, *map(len, group)], dtype=np.int32)
    tokens = np.full(context, PAD_ID, dtype=np.int32)
    weight = np.zeros(context, dtype=np.float32)
    for document, start, end in zip(group, boundaries[:-1], boundaries[1:]):
        tokens[start:end] = document.tokens
        weight[start:end] = loss_weights(document, vocabulary, objective)
    if boundaries[-1] < context:
        boundaries = np.append(boundaries, np.int32(context))
    lineage = tuple(
        {"key": one.key, "source": one.source, "length": len(one), "provenance": dict(one.provenance)} for one in group
    )
    return PackedSequence(key, tokens, boundaries, weight, len(group), lineage)
