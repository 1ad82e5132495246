"""Records and samples as Arrow batches, in which they pass from the process that parses a file to the one that uses it.

In: records or samples, and the names of the columns that are used. Out: serialized batches of these columns alone, and
the records or samples again, or the columns of text as they lie in the batch. A batch has `index` int64 and `reason`
utf8, null for a good one; of column number c the values that are text as `text<c>` utf8, and where there are others
also `raw<c>` (text that is not valid Unicode), `bytes<c>`, `codes<c>` (VQGAN codes), and for whatever else `type<c>`
and `shown<c>`, its type's name and its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from storage.errors import BadData
from tokenization.readers.record import BadRecord, NotText, Record
from tokenization.readers.webdataset_tar import BadSample, Sample

_ROWS = 1024
_CHARS = 1 << 20
_SAMPLES = 64
_SPAN = 8 << 20  # bytes of a tar whose samples are listed before the first of them is used
_CODES = pa.list_(pa.list_(pa.int64()))
_TYPES = {
    "text": pa.utf8(),
    "raw": pa.binary(),
    "bytes": pa.binary(),
    "codes": _CODES,
    "type": pa.utf8(),
    "shown": pa.utf8(),
}
_OF_SAMPLES = {"key": pa.utf8(), "member": pa.utf8(), "kind": pa.utf8(), "offset": pa.int64(), "size": pa.int64()}
_ABSENT = object()


def pack_records(records: Iterable[Record | BadRecord], columns: Sequence[str]) -> Iterator[pa.Buffer]:
    """Serialized batches of about a MiB. Of records that end in BadData, those before it come first."""
    held: list[Record | BadRecord] = []
    chars = 0
    try:
        for record in records:
            held.append(record)
            if type(record) is tuple:
                for value in record[1].values():
                    if type(value) is str or type(value) is bytes:
                        chars += len(value)
            if chars >= _CHARS or len(held) == _ROWS:
                yield _packed_records(held, columns)
                held, chars = [], 0
    except BadData:
        if held:
            yield _packed_records(held, columns)
        raise
    if held:
        yield _packed_records(held, columns)


@dataclass(frozen=True)
class TextColumns:
    """Consecutive records of a file, whose texts lie in columns.

    index: int64 [n], of each in its file. texts: by name, utf8 [n], null where a record holds no text. others: by row,
    what is no record of texts alone, as a record or BadRecord: with it the nulls are explained.
    """

    index: np.ndarray
    texts: dict[str, pa.StringArray]
    others: dict[int, Record | BadRecord]

    def __len__(self) -> int:
        return len(self.index)

    def part(self, start: int, end: int) -> TextColumns:
        """The records from row `start` to row `end`."""
        texts = {name: column.slice(start, end - start) for name, column in self.texts.items()}
        others = {row - start: one for row, one in self.others.items() if start <= row < end}
        return TextColumns(self.index[start:end], texts, others)

    def record(self, row: int) -> Record | BadRecord:
        """One of them, as `unpack_records` has it."""
        if (other := self.others.get(row)) is not None:
            return other
        return int(self.index[row]), {name: column[row].as_py() for name, column in self.texts.items()}


def unpack_texts(data: Any, columns: Sequence[str]) -> TextColumns:
    """What `pack_records` made a batch of, with texts as columns. Raises as `unpack_records` does."""
    batch = _batch(data, {})
    texts = {column: batch[f"text{number}"] for number, column in enumerate(columns)}
    is_other = batch["reason"].is_valid().to_numpy(zero_copy_only=False)
    for column in texts.values():
        if column.null_count:
            is_other = is_other | column.is_null().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(is_other)
    others = dict(zip(rows.tolist(), _records(batch.take(pa.array(rows)), columns))) if len(rows) else {}
    return TextColumns(batch["index"].to_numpy(), texts, others)


def unpack_records(data: Any, columns: Sequence[str]) -> list[Record | BadRecord]:
    """What `pack_records` made a batch of. Raises built-in and Arrow's errors on anything else."""
    return _records(_batch(data, {}), columns)


def _records(batch: pa.RecordBatch, columns: Sequence[str]) -> list[Record | BadRecord]:
    indices, reasons = batch["index"].to_numpy().tolist(), batch["reason"]
    fields = _fields(batch, columns)
    if reasons.null_count == len(reasons):
        return list(zip(indices, fields, strict=True))
    return [
        (index, own) if reason is None else BadRecord(index, reason)
        for index, own, reason in zip(indices, fields, reasons.to_pylist())
    ]


def pack_samples(samples: Iterable[Sample | BadSample], columns: Sequence[str]) -> Iterator[pa.Buffer]:
    """Serialized batches of some samples that lie close together."""
    held: list[Sample | BadSample] = []
    start = end = 0
    for sample in samples:
        held.append(sample)
        if isinstance(sample, Sample):
            end = sample.offset + sample.size
        if len(held) == _SAMPLES or end - start >= _SPAN:
            yield _packed_samples(held, columns)
            held, start = [], end
    if held:
        yield _packed_samples(held, columns)


def unpack_samples(data: Any, columns: Sequence[str]) -> list[Sample | BadSample]:
    """What `pack_samples` made a batch of. Raises built-in and Arrow's errors on anything else."""
    batch = _batch(data, _OF_SAMPLES)
    places = zip(*(batch[name].to_pylist() for name in ("index", "reason", *_OF_SAMPLES)))
    found: list[Sample | BadSample] = []
    for (number, reason, key, member, kind, offset, size), side in zip(places, _fields(batch, columns)):
        if reason is not None:
            found.append(BadSample(number, key, reason))
        elif key is None or member is None or kind not in ("video", "image") or min(offset, size) < 0:
            raise ValueError("a sample without its place")
        else:
            found.append(Sample(number, key, member, kind, offset, size, side))
    return found


def _packed_records(records: Sequence[Record | BadRecord], columns: Sequence[str]) -> pa.Buffer:
    none: dict[str, Any] = {}
    if BadRecord not in set(map(type, records)):
        indices, fields = zip(*cast("Sequence[Record]", records))
        return _packed(indices, pa.nulls(len(records), pa.utf8()), fields, columns, {})
    rows = [(one.index, one.reason, none) if isinstance(one, BadRecord) else (one[0], None, one[1]) for one in records]
    indices, reasons, fields = zip(*rows)
    return _packed(indices, _reasons(reasons), fields, columns, {})


def _packed_samples(samples: Sequence[Sample | BadSample], columns: Sequence[str]) -> pa.Buffer:
    rows = [(one.number, getattr(one, "reason", None), getattr(one, "side", {})) for one in samples]
    places = {name: pa.array([getattr(one, name, None) for one in samples], _OF_SAMPLES[name]) for name in _OF_SAMPLES}
    indices, reasons, fields = zip(*rows)
    return _packed(indices, _reasons(reasons), fields, columns, places)


def _reasons(reasons: Sequence[str | None]) -> pa.Array:
    return pa.array([reason and reason.encode("utf-8", "replace").decode() for reason in reasons], pa.utf8())


def _packed(
    indices: Sequence[int],
    reasons: pa.Array,
    fields: Sequence[dict[str, Any]],
    columns: Sequence[str],
    more: dict[str, pa.Array],
) -> pa.Buffer:
    arrays = {"index": pa.array(indices, pa.int64()), "reason": reasons, **more}
    for number, name in enumerate(columns):
        parts = _parts([own.get(name, _ABSENT) for own in fields], "vision" in name)
        arrays |= {f"{kind}{number}": array for kind, array in parts.items()}
    batch = pa.record_batch(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _parts(values: list[Any], may_be_codes: bool) -> dict[str, pa.Array]:
    """A column's values by their kind; those that are not of a kind are null in its array."""
    types = set(map(type, values))
    if types <= {str}:
        return _texts(values)
    parts = {"text": pa.nulls(len(values), pa.utf8())}
    if str in types:
        parts = _texts([value if isinstance(value, str) else None for value in values])
    if bytes in types:
        parts["bytes"] = pa.array([value if isinstance(value, bytes) else None for value in values], pa.binary())
    codes = [_codes(value) if may_be_codes else None for value in values]
    if any(found is not None for found in codes):
        parts["codes"] = pa.array(codes, _CODES)
    others = [
        None if isinstance(value, str | bytes) or value is _ABSENT or found is not None else _not_text(value)
        for value, found in zip(values, codes)
    ]
    if any(others):
        parts["type"] = pa.array([other and other.type_name for other in others], pa.utf8())
        parts["shown"] = pa.array([other and other.shown for other in others], pa.utf8())
    return parts


def _texts(values: list[str | None]) -> dict[str, pa.Array]:
    try:
        return {"text": pa.array(values, pa.utf8())}
    except UnicodeEncodeError:  # a lone surrogate, which costs its record and no other
        texts, raw = zip(*(_text_or_raw(value) for value in values))
        return {"text": pa.array(texts, pa.utf8()), "raw": pa.array(raw, pa.binary())}


def _text_or_raw(value: str | None) -> tuple[str | None, bytes | None]:
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        return None, error.object.encode("utf-8", "surrogatepass")
    return value, None


def _not_text(value: Any) -> NotText:
    if isinstance(value, NotText):
        return value
    shown = str(value) if isinstance(value, int | float) and abs(value) < 1e100 else None
    return NotText(type(value).__name__, shown)


def _codes(value: Any) -> list[list[int]] | None:
    try:
        return cast("list[list[int]]", pa.scalar(value, _CODES).as_py()) if isinstance(value, list) else None
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def _batch(data: Any, more: dict[str, pa.DataType]) -> pa.RecordBatch:
    with pa.ipc.open_stream(data) as stream:
        batch = stream.read_next_batch()
    batch.validate(full=True)
    expected = {"index": pa.int64(), "reason": pa.utf8(), **more}
    for field in batch.schema:
        if field.type != expected.pop(field.name, _TYPES.get(field.name.rstrip("0123456789"))):
            raise ValueError(f"a column {field.name} of {field.type}")
    if expected:
        raise ValueError(f"no column {next(iter(expected))}")
    return batch


def _fields(batch: pa.RecordBatch, columns: Sequence[str]) -> list[dict[str, Any]]:
    names = set(batch.schema.names)
    found: list[dict[str, Any]] = []
    for number, column in enumerate(columns):
        for kind, read in _READ.items():
            if f"{kind}{number}" not in names:
                continue
            array = batch[f"{kind}{number}"]
            if array.null_count == len(array):
                continue
            values = read(array)
            if not found and not array.null_count:  # of most files
                found = [{column: value} for value in values]
                continue
            found = found or [{} for _ in values]
            for own, value in zip(found, values, strict=True):
                if value is not None:
                    own[column] = value
        if f"type{number}" in names:
            found = found or [{} for _ in range(len(batch))]
            shown = batch[f"shown{number}"].to_pylist()
            for own, type_name, text in zip(found, batch[f"type{number}"].to_pylist(), shown, strict=True):
                if type_name is not None:
                    own[column] = NotText(type_name, text)
    return found or [{} for _ in range(len(batch))]


_READ: dict[str, Callable[[pa.Array], list[Any]]] = {
    "text": lambda array: array.to_numpy(zero_copy_only=False).tolist(),  # several times as fast as to_pylist
    "raw": lambda array: [value and value.decode("utf-8", "surrogatepass") for value in array.to_pylist()],
    "bytes": pa.Array.to_pylist,
    "codes": pa.Array.to_pylist,
}
