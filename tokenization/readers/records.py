"""Text-like objects to records, streamed: `.txt`, `.md` (a file is one record, {"text": ...}), `.jsonl`, `.parquet`.

In: a binary file and its URL, whose extension selects the format. Out: (index, record) pairs one by one, with a
BadRecord in place of each bad record. An object that cannot be read at all, or of which most lines are bad, raises
BadData. `SideData` joins the records of such files (captions, questions, answers) to media objects by key.

Memory holds one record and a buffer: a line longer than `max_record_bytes` is skipped. Parquet's pages are decoded
whole; rows that expand to many times their stored bytes, as in a decompression bomb, are refused before that.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
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
BATCH_BYTES = 128 << 20  # most bytes of those rows, where a dictionary makes rows larger than they are stored
EXPANSION = 200  # most decoded bytes per stored byte of a Parquet row group over `BATCH_BYTES`; text has 3 to 10
BAD_LINES = 100  # bad lines after which a file of mostly bad lines is refused
BOM = b"\xef\xbb\xbf"
EXTENSIONS = (".txt", ".md", ".jsonl", ".parquet")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # no reader knows which of two values is meant
        names = [name for name, _ in pairs]
        raise BadData(f'the key "{next(name for name in names if names.count(name) > 1)}" occurs twice')
    return record


_DECODE = json.JSONDecoder(object_pairs_hook=_unique).raw_decode

Record = tuple[int, dict[str, Any]]
"""The record's index in its file (line or row from 0, blank and bad ones counted) and its fields."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its index and the reason."""

    index: int
    reason: str


def read_records(file: BinaryIO, url: str, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record | BadRecord]:
    """Records of an object, in order.

    file: open for reading; Parquet has to be seekable. Raises UserError on an extension that is none of `EXTENSIONS`
    and, when iterated, BadData on an object that is not of the format of its extension.
    """
    extension = posixpath.splitext(_path(url))[1].lower()
    if extension not in EXTENSIONS:
        found = extension or "a name without extension"
        raise UserError(f"{url}: records are read from {', '.join(EXTENSIONS)}, not {found}")
    read = {".jsonl": _read_json_lines, ".parquet": _read_parquet}.get(extension, _read_text)
    return read(file, max_record_bytes)


def _read_text(file: BinaryIO, limit: int) -> Iterator[Record]:
    content = bytearray()
    while part := file.read(min(READ_BYTES, limit + 1 - len(content))):
        content += part
        if len(content) > limit:
            raise BadData(f"the file is larger than {limit} bytes, the most for one record")
    yield 0, {"text": decode_text(bytes(content.removeprefix(BOM)))}


def decode_text(content: bytes) -> str:
    """Decode UTF-8. Raises BadData with the offset of the first byte that is none, or of a NUL (UTF-16 has many)."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None
    if (place := content.find(0)) >= 0:
        raise BadData(f"not text: a NUL byte at offset {place}")
    return text


def _read_json_lines(file: BinaryIO, limit: int) -> Iterator[Record | BadRecord]:
    waiting: list[Record | BadRecord] = []  # bad records wait for the first good one
    good = bad = lines = 0
    for index, line in enumerate(_lines(file, limit)):
        lines += 1
        if line is not None and not line.strip():
            continue
        record = _line_record(index, line, limit)
        waiting.append(record)
        if isinstance(record, BadRecord):
            bad += 1
            if bad > max(BAD_LINES, good):
                raise BadData(f"{bad} of its first {lines} lines are bad, the last because of {record.reason}")
        else:
            good += 1
        if good:
            yield from waiting
            waiting.clear()
    yield from waiting if lines else [BadRecord(0, "the file is empty")]


def _line_record(index: int, line: bytes | None, limit: int) -> Record | BadRecord:
    where = f"line {index + 1}"
    if line is None:
        return BadRecord(index, f"{where}: longer than {limit} bytes, the most for one record")
    try:
        text = decode_text(line.removeprefix(BOM) if index == 0 else line).strip(" \t\r\n")
        value, end = _DECODE(text)  # `json.loads` takes longer for a short text
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except BadData as error:
        return BadRecord(index, f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        return BadRecord(index, f"{where}: broken JSON ({error})")
    if not isinstance(value, dict):
        return BadRecord(index, f"{where}: the JSON is {type(value).__name__}, not an object")
    return index, value


def _lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Lines without their line feed; None for a line longer than the limit, which is skipped."""
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
        raise BadData(f'the column "{twice[0]}" occurs twice')
    first = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        index, end = first, first + group.num_rows
        first = end
        try:
            rows, most = _bounds(file, group, limit)
            for batch in parquet.iter_batches(rows, row_groups=[number], use_threads=False):
                # In Arrow's dictionaries each row counts as four bytes.
                columns = [
                    one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns
                ]
                batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
                most -= batch.nbytes
                if most < 0:
                    raise BadData("they expand to many times their stored bytes")
                yield from _rows(batch, index, limit)
                index += batch.num_rows
        except (pa.ArrowException, OSError, BadData) as error:
            yield BadRecord(index, f"rows {index} to {end - 1} are unreadable ({_first_line(error)})")


def _bounds(file: BinaryIO, group: pq.RowGroupMetaData, limit: int) -> tuple[int, int]:
    """The number of rows of a row group to decode at a time, and the most bytes that all its rows may have.

    Raises BadData where the file's own metadata states more bytes.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    stored = sum(column.total_compressed_size for column in columns)
    most = max(BATCH_BYTES, EXPANSION * stored)
    # A run of equal values in lists is stored as one value, so their number counts as well as the uncompressed size.
    size = sum(max(column.total_uncompressed_size, 4 * column.num_values) for column in columns)
    if size > most:
        raise BadData(f"{size} bytes are stored in {stored}")
    rows = PARQUET_ROWS
    for column in columns:
        if column.has_dictionary_page and rows * column.total_uncompressed_size > BATCH_BYTES:
            rows = min(rows, max(1, BATCH_BYTES // max(1, _dictionary_bytes(file, column))))
    return rows, most


def _dictionary_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """The decompressed size of a column's dictionary, which is the most that a row can have.

    It is the second integer of a page header. In Thrift's compact protocol an integer is a byte for the field, then
    seven bits per byte from the lowest on, of which the lowest is the sign.
    """
    file.seek(column.dictionary_page_offset)
    size = re.match(rb".[\x80-\xff]*[\x00-\x7f].([\x80-\xff]*[\x00-\x7f])", file.read(32), re.DOTALL)
    if size is None:  # no header that a writer makes
        return int(column.total_uncompressed_size)
    value = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(size[1]))
    return min(value >> 1, int(column.total_uncompressed_size))


def _rows(batch: pa.RecordBatch, first: int, limit: int) -> Iterator[Record | BadRecord]:
    """The rows of a batch, converted together unless one may be too large or not text."""
    if batch.nbytes <= limit:
        try:
            columns = [column.to_pylist() for column in batch.columns]
        except ValueError:
            pass
        else:
            names = batch.schema.names
            yield from enumerate((dict(zip(names, row)) for row in zip(*columns)), first)
            return
    for index in range(first, first + batch.num_rows):
        row = batch.slice(index - first, 1)
        if row.nbytes > limit:
            yield BadRecord(index, f"row {index}: larger than {limit} bytes, the most for one record")
            continue
        try:
            (record,) = row.to_pylist()
        except ValueError as error:
            yield BadRecord(index, f"row {index}: {_first_line(error)}")
        else:
            yield index, record


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _path(url: str) -> str:
    """The path of a URL, without the query of a web address."""
    parts = urlsplit(url)
    return parts.path if parts.scheme in ("http", "https") else url


@contextlib.contextmanager
def _unreadable_named(url: str) -> Iterator[None]:
    try:
        yield
    except BadData as error:
        raise UserError(f"{url}: no side data can be read from it ({error}); mend the file, or take it out") from None


@dataclass(frozen=True)
class SideData:
    """Fields of media objects that come from separate files, by key.

    A row's key is in its `key` or `file` column: a URL, a path or its end (`clips/bikes.mp4`), a file name, or any of
    these without extension. bad: rows that could not be used, each with the URL of its file.
    """

    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    bad: tuple[tuple[str, BadRecord], ...] = ()

    @classmethod
    def load(cls, files: Iterable[tuple[str, BinaryIO]], max_record_bytes: int = MAX_RECORD_BYTES) -> SideData:
        """Read (URL, open file) pairs of `.jsonl` or `.parquet`; each file is closed.

        Raises UserError on a row without a key, on a repeated key, and on an unreadable file.
        """
        rows: dict[str, dict[str, Any]] = {}
        bad: list[tuple[str, BadRecord]] = []
        for url, file in files:
            with file, _unreadable_named(url):
                for record in read_records(file, url, max_record_bytes):
                    if isinstance(record, BadRecord):
                        bad.append((url, record))
                        continue
                    index, fields = record
                    column = next((name for name in ("key", "file") if fields.get(name) not in (None, "")), None)
                    if column is None:
                        raise UserError(f"{url}: row {index} has no key; give every row a `key` or a `file` column")
                    key = str(fields.pop(column))
                    if key in rows:
                        raise UserError(f'{url}: row {index} repeats the key "{key}"; keep one row for each object')
                    rows[key] = fields
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
