"""Columns of texts and a field spec to the tokens of many training examples, those that `tokenization.fields` makes one
by one.

In: by name a column of texts, a row an example. Out: which rows the spec fits, and the tokens and spans with loss of
rows that it fits, without an object for each. For specs without vision fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.compiled import compiled
from tokenization.field_spec import BOS, EOS, Field, FieldSpec
from tokenization.fields import check_sizes
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

Texts = Mapping[str, pa.StringArray]


@dataclass(frozen=True)
class Examples:
    """Consecutive training examples. tokens: int32 [L] of all of them; ends: int64 [n], where each ends in there.

    spans: int64 [m, 2], half-open, of the tokens with loss, counted from the first token of their example; span_ends:
    int64 [n], where those of each example end in `spans`.
    """

    tokens: np.ndarray
    ends: np.ndarray
    spans: np.ndarray
    span_ends: np.ndarray


def fits(texts: Texts, spec: FieldSpec) -> np.ndarray:
    """Bool [n]: the rows that `spec.check` accepts, of columns that are null where a record holds no text."""
    is_there = [texts[name].is_valid() for name in spec.names]
    names = [name for field in spec.fields if field.loss and not field.is_marker for name in field.names]
    if names:
        is_there.append(reduce(pc.or_, [pc.invert(_is_blank(texts[name])) for name in names]))
    return np.asarray(pc.fill_null(reduce(pc.and_, is_there), False))


def build_examples(texts: Texts, spec: FieldSpec, tokenizer: TextTokenizer, vocabulary: JointVocabulary) -> Examples:
    """The examples of rows that the spec fits, BOS and EOS included, as `build_tokens` makes each.

    Raises BadData where a text is none (`TextTokenizer.encode_column`), UserError on a tokenizer with more ids than the
    vocabulary has for text.
    """
    check_sizes(tokenizer, vocabulary)
    entries = [Field((BOS,), loss=False), *spec.fields, Field((EOS,), loss=True)]
    n = len(texts[spec.names[0]])
    pieces = [np.array([vocabulary.bos_id, vocabulary.eos_id], dtype=np.int32)]
    starts, lengths = np.empty((2, n, len(entries)), dtype=np.int64)
    at = len(pieces[0])
    for place, field in enumerate(entries):
        if field.is_marker:
            starts[:, place], lengths[:, place] = int(field.names != (BOS,)), 1
            continue
        ids, ends = tokenizer.encode_column(_joined(texts, field))
        lengths[:, place] = np.diff(ends, prepend=0)
        starts[:, place] = at + ends - lengths[:, place]
        pieces.append(ids)
        at += len(ids)
    loss = np.array([field.loss for field in entries])
    return Examples(*_laid_out(np.concatenate(pieces), starts, lengths, loss))


def _is_blank(column: pa.StringArray) -> pa.BooleanArray:
    return pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))


def _joined(texts: Texts, field: Field) -> pa.StringArray:
    columns = [texts[name] for name in field.names]
    return pc.binary_join_element_wise(*columns, " ") if len(columns) > 1 else columns[0]


@compiled
def _laid_out(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, loss: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The fields of `Examples` whose entries are pieces of `ids`. starts, lengths: int64 [n, entries]; loss: [entries].

    Adjacent spans are merged, and token 0 is left out.
    """
    n, n_entries = starts.shape
    tokens = np.empty(lengths.sum(), dtype=np.int32)
    ends, span_ends = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    spans = np.empty((n * n_entries, 2), dtype=np.int64)
    at = n_spans = 0
    for row in range(n):
        first, first_span = at, n_spans
        for entry in range(n_entries):
            start, length = starts[row, entry], lengths[row, entry]
            tokens[at : at + length] = ids[start : start + length]
            begin = max(at - first, 1)
            at += length
            if loss[entry] and begin < at - first:
                if n_spans > first_span and spans[n_spans - 1, 1] == begin:
                    n_spans -= 1
                else:
                    spans[n_spans, 0] = begin
                spans[n_spans, 1] = at - first
                n_spans += 1
        ends[row], span_ends[row] = at, n_spans
    return tokens, ends, spans[:n_spans].copy(), span_ends
