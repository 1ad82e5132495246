"""The lineage of examples in columns: the JSON of each, spliced from the JSON of its document without parsing it.

In: the columns of a batch of documents, and which part of which document each example is. Out: a JSON object for each
example, in the very bytes that `json` gives of it with sorted keys and without spaces: key, length, provenance, source.
The provenance of documents is such JSON already; only into that of a piece `document_range` is put.
"""

from __future__ import annotations

import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_ESCAPED = r"[^ !#-\[\]-~]"  # what JSON in ASCII cannot hold as it is
_RANGE = "document_range"


def lineage_entries(batch: pa.RecordBatch, row: np.ndarray, start: np.ndarray, end: np.ndarray) -> pa.LargeStringArray:
    """The JSON object of each of N examples.

    batch: documents, with the columns key, source, tokens and provenance. row, start, end: int64 [N], the document of
    an example and its range of tokens in it. An example that is not the whole document has `key@start` for its key, and
    its provenance has the range as `document_range`.
    """
    key, source, provenance = (_rows(batch.column(name), row) for name in ("key", "source", "provenance"))
    is_piece = end - start < pc.list_value_length(batch.column("tokens")).to_numpy()[row]
    if is_piece.any():
        key = pc.if_else(is_piece, _joined(key, "@", _decimal(start)), key)
        ranged = [
            _with_range(text, first, last)
            for text, first, last in zip(
                provenance.filter(is_piece).to_pylist(), start[is_piece].tolist(), end[is_piece].tolist()
            )
        ]
        provenance = pc.replace_with_mask(provenance, is_piece, pa.array(ranged, pa.large_string()))
    head = ('{"key":', _quoted(key), ',"length":', _decimal(end - start))
    return _joined(*head, ',"provenance":', provenance, ',"source":', _quoted(source), "}")


def _joined(*parts: str | pa.LargeStringArray) -> pa.LargeStringArray:
    """The strings of each row end to end; one that is no array is the same in all rows."""
    columns = [pa.scalar(part, pa.large_string()) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*columns, pa.scalar("", pa.large_string()))


def _rows(column: pa.StringArray, row: np.ndarray) -> pa.LargeStringArray:
    strings = column.cast(pa.large_string())  # pieces of one document may repeat more than 2 GiB of provenance
    return strings if np.array_equal(row, np.arange(len(strings))) else strings.take(pa.array(row))


def _decimal(numbers: np.ndarray) -> pa.LargeStringArray:
    return pa.array(numbers).cast(pa.large_string())


def _quoted(strings: pa.LargeStringArray) -> pa.LargeStringArray:
    """Each string as JSON in ASCII."""
    quoted = _joined('"', strings, '"')
    escaped = pc.match_substring_regex(strings, _ESCAPED)
    if not pc.any(escaped).as_py():
        return quoted
    texts = [json.dumps(text) for text in strings.filter(escaped).to_pylist()]
    return pc.replace_with_mask(quoted, escaped, pa.array(texts, pa.large_string()))


def _with_range(provenance: str, start: int, end: int) -> str:
    before, after = _around_range(provenance)
    return f"{before}[{start},{end}]{after}"


@functools.lru_cache(maxsize=1)  # the pieces of a document follow each other
def _around_range(provenance: str) -> tuple[str, str]:
    """What the JSON of an object has before and after the value of `document_range`, where its keys are sorted."""
    plain = json.loads(provenance)
    before = _ENCODE({key: value for key, value in plain.items() if key < _RANGE})
    after = _ENCODE({key: value for key, value in plain.items() if key > _RANGE})
    comma_before, comma_after = ("," if len(part) > 2 else "" for part in (before, after))
    return f'{before[:-1]}{comma_before}"{_RANGE}":', f"{comma_after}{after[1:]}"
