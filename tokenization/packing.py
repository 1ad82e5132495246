"""Documents to packed sequences: split what is too long, fill contexts best-fit, weigh each token, shuffle.

In: a stream of documents in a fixed order. Out: a stream of `PackedSequence`, each exactly one context long.
The stream is cut into windows of documents; a window is packed by best-fit-decreasing and forgotten, but for the
documents of its emptiest sequences, which the next window gets: else each would end with a sequence that has little in
it, at a million tokens one of seven. Before that the others exchange documents with them to be full. Memory is bounded
by the window and that share of it, and what comes out of a window does not depend on what follows. Packing sorts by
length; the shuffle of sequences within a window and of documents within a sequence undoes that, so that training meets
no run of equal lengths.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tokenization.best_fit import best_fit, fill_window
from tokenization.document import Document, PackedSequence
from tokenization.permutation import derive_key, permute
from tokenization.vocabulary import JointVocabulary
from tokenization.weights import Objective, check_objective, loss_weights

__all__ = ["PackCounts", "best_fit", "fill", "filled", "loss_weights", "pack", "split_document"]

WINDOW = 10_000
WINDOW_TOKENS = 1 << 28
HELD = 2  # at most one part in so many of a window, in documents and in tokens, goes over to the next
TOO_SHORT = "shorter than 2 tokens, so nothing to predict"
PAD_ID = 0


@dataclass
class PackCounts:
    """What went into packing and came out; filled in as `pack` runs, plain numbers for a manifest."""

    documents: int = 0
    split: int = 0
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def split_document(document: Document, context: int) -> list[Document]:
    """The document itself, or its pieces of at most `context` tokens, in order and without overlap.

    Piece keys are `key@start`; provenance gains `document_range` = [start, end) in tokens of the whole. A piece's first
    token is no target, as at the head of any document: what would predict it lies in the piece before.
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
    objective: Objective,
    *,
    window: int = WINDOW,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
    key_prefix: str = "",
    counts: PackCounts | None = None,
) -> Iterator[PackedSequence]:
    """Pack documents into sequences of exactly `context` tokens, keyed `{key_prefix}{number:08d}`.

    A window closes at `window` examples or `window_tokens` tokens (4 bytes each), whichever comes first, not counting
    those that it got from the window before. Documents over
    the context are split; those, and last pieces, of fewer than 2 tokens are left out and counted in `counts.skipped`.
    Room that nothing fills is one last run of token 0 with weight 0, ended by `cu_seqlens` like a document but not an
    example. Raises ValueError on a context under 2, UserError as `loss_weights`.
    """
    check_objective(objective)
    if context < 2:
        raise ValueError(f"context {context} has room for no target: at least 2 tokens are needed")
    counts = PackCounts() if counts is None else counts
    examples = _examples(documents, context, counts)
    serial = itertools.count()
    held: list[Document] = []
    for number, (members, is_last) in enumerate(_windows(examples, window, window_tokens)):
        most = (0, 0) if is_last else (window // HELD, max(window_tokens // HELD, context))
        groups, held = _groups(held + members, context, derive_key(seed, number), *most)
        for group in groups:
            counts.sequences += 1
            yield _sequence(f"{key_prefix}{next(serial):08d}", group, context, vocabulary, objective)


def filled(sequence: PackedSequence) -> int:
    """Tokens of the sequence that belong to documents: all but the trailing padding run."""
    return int(sequence.cu_seqlens[sequence.n_examples])


def fill(sequences: Iterable[PackedSequence]) -> float:
    """Share of all positions that hold a document's token, 0..1; 0 for no sequences."""
    used = total = 0
    for sequence in sequences:
        used += filled(sequence)
        total += len(sequence.tokens)
    return used / total if total else 0.0


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


def _windows(examples: Iterable[Document], window: int, window_tokens: int) -> Iterator[tuple[list[Document], bool]]:
    """Windows, and whether they are the last, which holds what no full window took, if anything."""
    members: list[Document] = []
    tokens = 0
    for example in examples:
        members.append(example)
        tokens += len(example)
        if len(members) >= window or tokens >= window_tokens:
            yield members, False
            members, tokens = [], 0
    yield members, True


def _groups(
    members: list[Document], context: int, key: np.ndarray, most: int, most_tokens: int
) -> tuple[list[list[Document]], list[Document]]:
    """The window's bins in shuffled order, each with its documents in shuffled order, and the documents held back."""
    lengths = np.array([len(member) for member in members], dtype=np.int64)
    bin_of, n_bins, is_held = fill_window(lengths, context, most, most_tokens)
    bin_place = permute(np.arange(n_bins), n_bins, derive_key(0) ^ key)[bin_of]
    member_place = permute(np.arange(len(members)), len(members), derive_key(1) ^ key)
    order = np.lexsort((member_place, bin_place))
    order = order[~is_held[order]]
    ends = np.flatnonzero(np.diff(bin_place[order])) + 1
    groups = [[members[index] for index in chosen] for chosen in np.split(order, ends) if len(chosen)]
    return groups, [members[index] for index in np.flatnonzero(is_held)]


def _sequence(
    key: str, group: list[Document], context: int, vocabulary: JointVocabulary, objective: Objective
) -> PackedSequence:
    boundaries = np.cumsum([0, *map(len, group)], dtype=np.int32)
    tokens = np.full(context, PAD_ID, dtype=np.int32)
    weight = np.zeros(context, dtype=np.float32)
    for document, start, end in zip(group, boundaries[:-1], boundaries[1:]):
        tokens[start:end] = document.tokens
        weight[start:end] = loss_weights(document, vocabulary, objective)
    if boundaries[-1] < context:
        boundaries = np.append(boundaries, np.int32(context))
    return PackedSequence(key, tokens, boundaries, weight, len(group), tuple(map(_lineage, group)))


def _lineage(document: Document) -> dict[str, object]:
    return {
        "key": document.key,
        "source": document.source,
        "length": len(document),
        "provenance": dict(document.provenance),
    }
