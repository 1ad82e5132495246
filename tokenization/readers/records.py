"""Text-like objects to records, streamed: `.txt`, `.md` (a file is one record, {"text": ...}), `.jsonl`, `.parquet`.

In: a binary file and its URL, whose extension decides. Out: (index, record) pairs one by one, a bad record in its place
as a BadRecord, so that it costs itself and no other. What makes the whole object unreadable raises BadData. `SideData`
joins the records of such files (captions, questions, answers) to media objects by key.

Memory holds one record and a buffer, whatever the file's size: a longer line than `max_record_bytes` is read past, not
held. Of Parquet a page must be decoded whole, as its writer sized it; rows that come to many times the bytes that they
lie in, a bomb, are refused before they are decoded. A file that is mostly bad ends as one: its reason stands for them.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import BadData, UserError

MAX_RECORD_BYTES = 64 << 20  # a book of several million tokens is 10 to 20 MB
READ_BYTES = 1 << 20
PARQUET_ROWS = 64  # decoded at a time
BATCH_BYTES = 128 << 20  # what those come to, at most, where a dictionary lets rows be larger than what is stored
EXPANSION = 200  # bytes that one stored byte of Parquet may come to, past a record's most; text comes to 3 or 10
BAD_LINES = 100  # bad ones in a file of mostly bad lines before it is taken for no file of records
BOM = b"\xef\xbb\xbf"
_JSON_SPACE = " \t\r\n"
EXTENSIONS = (".txt", ".md", ".jsonl", ".parquet")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadData(f'the key "{next(name for name in names if names.count(name) > 1)}" stands twice')
    return record


_DECODE = json.JSONDecoder(object_pairs_hook=_unique).raw_decode

Record = tuple[int, dict[str, Any]]
"""The record's index in its file (line or row from 0, blank and bad ones counted) and its fields."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: the index it would have had, and why."""

    index: int
    reason: str


def read_records(file: BinaryIO, url: str, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record | BadRecord]:
    """Records of an object, in order.

    file: open for reading, seekable for Parquet. Raises BadData, when iterated, if the object cannot be read as what
    its extension says, and UserError at once on an extension that is none of `EXTENSIONS`.
    """
    extension = posixpath.splitext(_path(url))[1].lower()
    if extension in (".txt", ".md"):
        return _read_text(file, max_record_bytes)
    if extension == ".jsonl":
        return _read_json_lines(file, max_record_bytes)
    if extension == ".parquet":
        return _read_parquet(file, max_record_bytes)
    raise UserError(
        f"{url}: records are read from {', '.join(EXTENSIONS)}, not {extension or 'a name without extension'}"
    )


def _read_text(file: BinaryIO, limit: int) -> Iterator[Record]:
    content = bytearray()
    while part := file.read(min(READ_BYTES, limit + 1 - len(content))):
        content += part
        if len(content) > limit:
            raise BadData(f"the file is larger than {limit} bytes, the most for one record")
    yield 0, {"text": decode_text(bytes(content.removeprefix(BOM)))}


def decode_text(content: bytes) -> str:
    """Bytes as UTF-8. Raises BadData with the place of the first that is none, and of the first NUL: no text has one,
    but UTF-16 is full of them.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None
    if (place := content.find(0)) >= 0:
        raise BadData(f"not text: a NUL byte at offset {place}")
    return text


def _read_json_lines(file: BinaryIO, limit: int) -> Iterator[Record | BadRecord]:
    waiting: list[BadRecord] = []  # bad ones before the first good one
    good = bad = lines = 0
    for index, line in enumerate(_lines(file, limit)):
        lines += 1
        if line is not None and not line.strip():
            continue
        record = _line_record(index, line, limit)
        if isinstance(record, BadRecord):
            bad += 1
            waiting.append(record)
            if bad > max(BAD_LINES, good):
                raise BadData(f"{bad} of its first {lines} lines are bad, the last because of {record.reason}")
        else:
            good += 1
        if good:
            yield from waiting
            waiting.clear()
        if not isinstance(record, BadRecord):
            yield record
    yield from waiting if lines else [BadRecord(0, "the file is empty")]


def _line_record(index: int, line: bytes | None, limit: int) -> Record | BadRecord:
    where = f"line {index + 1}"
    if line is None:
        return BadRecord(index, f"{where}: longer than {limit} bytes, the most for one record")
    try:
        value = _json(decode_text(line.removeprefix(BOM) if index == 0 else line).strip(_JSON_SPACE))
    except BadData as error:
        return BadRecord(index, f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        return BadRecord(index, f"{where}: broken JSON ({error})")
    if not isinstance(value, dict):
        return BadRecord(index, f"{where}: the JSON is {type(value).__name__}, not an object")
    return index, value


def _json(text: str) -> Any:
    """`json.loads` of a text without space around it, at less for a short one. Raises BadData where a key of an object
    stands twice: which of the values is meant, no reader knows.
    """
    value, end = _DECODE(text)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines without their end; None for one longer than the limit, whose rest is read past."""
    held = bytearray()
    too_long = False
    while part := file.read(READ_BYTES):
        *ended, rest = part.split(b"\n")
        for end in ended:
            yield None if too_long or len(held) + len(end) > limit else bytes(held + end)
            held.clear()
            too_long = False
        too_long = too_long or len(held) + len(rest) > limit
        if too_long:
            held.clear()
        else:
            held += rest
    if held or too_long:
        yield None if too_long else bytes(held)


def _read_parquet(file: BinaryIO, limit: int) -> Iterator[Record | BadRecord]:
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"not a whole Parquet file ({_first_line(error)})") from None
    names = parquet.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadData(f'the column "{twice[0]}" stands twice')
    first = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        index, end = first, first + group.num_rows
        first = end
        try:
            rows, most = _bounds(file, group, limit)
            for batch in map(_decoded, parquet.iter_batches(rows, row_groups=[number], use_threads=False)):
                most -= batch.nbytes
                if most < 0:
                    raise BadData("they come to many times the bytes that they lie in")
                yield from _rows(batch, index, limit)
                index += batch.num_rows
        except (pa.ArrowException, OSError, BadData) as error:
            yield BadRecord(index, f"rows {index} to {end - 1} are unreadable ({_first_line(error)})")


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without Arrow's dictionaries, in which a row takes four bytes whatever it comes to."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _bounds(file: BinaryIO, group: pq.RowGroupMetaData, limit: int) -> tuple[int, int]:
    """How many rows of a row group are decoded at a time, and the most bytes that all may come to.

    Raises BadData where what is stored comes to more, as the file itself says.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    most = max(BATCH_BYTES, EXPANSION * sum(column.total_compressed_size for column in columns))
    # A run of equal values in lists is stored as one: of those their number says what they come to.
    size = sum(max(column.total_uncompressed_size, 4 * column.num_values) for column in columns)
    if size > most:
        raise BadData(f"{size} bytes are said to lie in {sum(column.total_compressed_size for column in columns)}")
    rows = PARQUET_ROWS
    for column in columns:
        if column.has_dictionary_page and rows * column.total_uncompressed_size > BATCH_BYTES:
            rows = min(rows, max(1, BATCH_BYTES // max(1, _dictionary_bytes(file, column))))
    return rows, most


def _dictionary_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """Size of a column's dictionary, decompressed: no row is larger, but each may be as large.

    The header of a page begins with its type and that size, two integers of Thrift's compact protocol: each a byte for
    the field, then seven bits a byte from the lowest on, the sign in the lowest of all.
    """
    file.seek(column.dictionary_page_offset)
    header = file.read(16)
    place = 1
    value = 0
    for _ in range(2):
        value = shift = 0
        while place < len(header):
            byte = header[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        place += 1
    return min(value >> 1, int(column.total_uncompressed_size))


def _rows(batch: pa.RecordBatch, first: int, limit: int) -> Iterator[Record | BadRecord]:
    """The rows of a batch; all at once, unless one may be too large or not text."""
    if batch.nbytes <= limit:
        try:
            columns = [column.to_pylist() for column in batch.columns]
        except ValueError:
            pass
        else:
            names = batch.schema.names
            yield from enumerate((dict(zip(names, row)) for row in zip(*columns)), first)
            return
    for row in range(batch.num_rows):
        yield _row(batch, row, first + row, limit)


def _row(batch: pa.RecordBatch, row: int, index: int, limit: int) -> Record | BadRecord:
    if batch.slice(row, 1).nbytes > limit:
        return BadRecord(index, f"row {index}: larger than {limit} bytes, the most for one record")
    try:
        return index, {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns)}
    except ValueError as error:
        return BadRecord(index, f"row {index}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _path(url: str) -> str:
    """The path of a URL; the query of a web address is not part of it."""
    parts = urlsplit(url)
    return parts.path if parts.scheme in ("http", "https") else url


@dataclass(frozen=True)
class SideData:
    """What is known of media objects besides their bytes, by key.

    A row's key is its `key` or `file` column: a URL, a path or its end (`clips/bikes.mp4`), a file name, or any of
    these without extension. bad: rows that could not be used, each with the URL of its file.
    """

    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    bad: tuple[tuple[str, BadRecord], ...] = ()

    @classmethod
    def load(cls, files: Iterable[tuple[str, BinaryIO]], max_record_bytes: int = MAX_RECORD_BYTES) -> SideData:
        """Read (URL, open file) pairs of `.jsonl` or `.parquet`; each file is closed.

        Raises UserError on a row without a key and on a key that stands twice, BadData on an unreadable file.
        """
        rows: dict[str, dict[str, Any]] = {}
        bad: list[tuple[str, BadRecord]] = []
        for url, file in files:
            with file:
                for record in read_records(file, url, max_record_bytes):
                    if isinstance(record, BadRecord):
                        bad.append((url, record))
                        continue
                    index, fields = record
                    key, values = _keyed(fields, f"{url}: row {index}")
                    if key in rows:
                        raise UserError(f'{url}: row {index} repeats the key "{key}"; keep one row for each object')
                    rows[key] = values
        return cls(rows, tuple(bad))

    def get(self, url_or_key: str) -> dict[str, Any]:
        """The row of an object, without its key column; empty if there is none. The longest matching key wins."""
        whole = _path(url_or_key)
        parts = whole.split("/")
        for name in (url_or_key, whole, *("/".join(parts[start:]) for start in range(1, len(parts)))):
            for key in (name, posixpath.splitext(name)[0]):
                if key in self.rows:
                    return dict(self.rows[key])
        return {}

    def __len__(self) -> int:
        return len(self.rows)


def _keyed(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    for column in ("key", "file"):
        key = fields.get(column)
        if key is not None and key != "":
            return str(key), {name: value for name, value in fields.items() if name != column}
    raise UserError(f"{where} has no key; give every row a `key` or a `file` column")
