"""Packed sequences from the examples of a window: their tokens put together, weighed, and with their lineage.

In: `Examples`, and which of them each sequence consists of. Out: `PackedSequence`s, one at a time. The loops over
examples and their tokens are compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.compiled import compiled
from tokenization.document import EncodedLineage, PackedSequence
from tokenization.packing.examples import Examples
from tokenization.packing.loss_weights import modality_shares, outside_objective, weigh
from tokenization.vocabulary import JointVocabulary

PAD_ID = 0


def sequences(
    examples: Examples,
    groups: Sequence[np.ndarray],
    keys: Iterator[str],
    context: int,
    vocabulary: JointVocabulary,
    objective: str,
) -> Iterator[PackedSequence]:
    """The sequence of each group of examples (int64 [n], their numbers in order), of `context` tokens.

    keys: of the sequences, taken one by one. Raises UserError on targets of a modality that is not in the objective.
    """
    starts, shares = modality_shares(vocabulary, objective)
    first_span = np.cumsum(examples.n_spans) - examples.n_spans
    columns = _Columns(*(examples.pool, examples.start, examples.length), examples.spans, first_span, examples.n_spans)
    for group, lineage in zip(groups, _lineages(examples, groups)):
        tokens, weight = np.empty(context, np.int32), np.empty(context, np.float32)
        boundaries = np.empty(len(group) + 2, np.int32)
        member, modality, n_targets = _fill(columns, group, starts, shares, tokens, weight, boundaries)
        if n_targets:
            one = json.loads(examples.lineage[group[member]].as_py())
            raise outside_objective(one["key"], one["source"], vocabulary, modality, n_targets, objective)
        if boundaries[len(group)] == context:  # there is no room that a run of padding fills
            boundaries = boundaries[:-1]
        yield PackedSequence(next(keys), tokens, boundaries, weight, len(group), lineage)


def _lineages(examples: Examples, groups: Sequence[np.ndarray]) -> Iterator[EncodedLineage]:
    if not groups:
        return
    members = np.concatenate(groups)
    offsets = np.cumsum([0, *map(len, groups)])
    entries = pa.LargeListArray.from_arrays(pa.array(offsets), examples.lineage.take(pa.array(members)))
    documents = np.add.reduceat(examples.begins[members], offsets[:-1], dtype=np.int64)
    joined = pc.binary_join(entries, pa.scalar(",", pa.large_string()))
    _, ends, text = joined.buffers()  # read as they are: an Arrow scalar for each would take longer than the join
    whole, bounds = memoryview(text), np.frombuffer(ends, np.int64)[joined.offset :].tolist()
    for group, start, end, n_documents in zip(groups, bounds, bounds[1:], documents.tolist()):
        yield EncodedLineage(b"[%s]" % whole[start:end], len(group), n_documents)


class _Columns(NamedTuple):
    """The arrays of `Examples` that are compiled code's to read; spans of example i: spans[first_span[i] : ...]."""

    pool: np.ndarray
    start: np.ndarray
    length: np.ndarray
    spans: np.ndarray
    first_span: np.ndarray
    n_spans: np.ndarray


@compiled
def _fill(
    examples: _Columns,
    group: np.ndarray,
    starts: np.ndarray,
    shares: np.ndarray,
    tokens: np.ndarray,
    weights: np.ndarray,
    boundaries: np.ndarray,
) -> tuple[int, int, int]:
    """Write a group's tokens, weights and boundaries; returns the member and what `weigh` refuses of it, or zeros."""
    boundaries[0] = end = 0
    weights[:] = 0
    for member in range(len(group)):
        one = group[member]
        start, length, span = examples.start[one], examples.length[one], examples.first_span[one]
        begin, end = end, end + length
        tokens[begin:end] = examples.pool[start : start + length]
        spans = examples.spans[span : span + examples.n_spans[one]]
        modality, n_targets = weigh(tokens[begin:end], spans, starts, shares, weights[begin:end])
        if n_targets:
            return member, modality, n_targets
        boundaries[member + 1] = end
    tokens[end:] = PAD_ID
    boundaries[len(group) + 1 :] = len(tokens)
    return 0, 0, 0
