"""Text-like objects to records, streamed: `.txt`, `.md` (a file is one record, {"text": ...}), `.jsonl`, `.csv`,
`.tsv`, each also compressed as `.gz` or `.zst`, and `.parquet`.

In: a binary file and its URL, whose extension selects the format. Out: (index, record) pairs one by one, with a
BadRecord in place of each bad record. An object that cannot be read at all, or of which most lines are bad, raises
BadData. `SideData` joins the records of such files (captions, questions, answers) to media objects by key.

Memory holds one record and a buffer: a line longer than `max_record_bytes` is skipped.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa

from storage.errors import BadData, UserError
from tokenization.readers.csv_rows import read_csv
from tokenization.readers.parquet import parquet_columns, read_parquet
from tokenization.readers.record import (
    BOM,
    MAX_RECORD_BYTES,
    READ_BYTES,
    BadRecord,
    NotText,
    Record,
    decode_text,
    lines_of,
    unless_mostly_bad,
)

_PLAIN = (".txt", ".md", ".jsonl", ".csv", ".tsv")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED = {*_CODECS, ".bz2", ".xz"}
EXTENSIONS = (*_PLAIN, ".parquet", *(plain + packed for plain in _PLAIN for packed in _CODECS))

_FIRST_RECORDS = 1000  # that are looked at for the names of their fields

Read = Callable[[int], bytes]


def extension_of(url: str) -> str:
    """The extension of a URL or path, lower case; of a compressed file with that of what is compressed, `.jsonl.gz`."""
    stem, extension = posixpath.splitext(_path(url).lower())
    return posixpath.splitext(stem)[1] + extension if extension in _COMPRESSED else extension


def is_one_record(url: str) -> bool:
    """Whether a file is one record by its extension, compressed or not."""
    return extension_of(url).startswith((".txt", ".md"))


def read_records(
    file: BinaryIO, url: str, columns: Collection[str] | None = None, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record | BadRecord]:
    """Records of an object, in order.

    file: open for reading; Parquet has to be seekable. columns: the fields to read, None for all; others of a table are
    not looked at. Raises UserError on an extension that is none of `EXTENSIONS` and, when iterated, BadData on an
    object that is not of the format of its extension.
    """
    extension = extension_of(url)
    if extension not in EXTENSIONS:
        found = extension or "a name without extension"
        raise UserError(f"{url}: records are read from {', '.join(EXTENSIONS)}, not {found}")
    if extension == ".parquet":
        return read_parquet(file, columns, max_record_bytes)
    plain, packed = posixpath.splitext(extension) if extension.count(".") > 1 else (extension, "")
    read = _unpacked(file, _CODECS[packed]) if packed else file.read
    if plain == ".jsonl":
        return unless_mostly_bad(_json_lines(read, max_record_bytes))
    if plain in (".csv", ".tsv"):
        return unless_mostly_bad(read_csv(read, plain, columns, max_record_bytes))
    return _text(read, max_record_bytes)


def column_names(file: BinaryIO, url: str) -> tuple[list[str], bool]:
    """The fields of an object's first records, and whether no record of it can have another. Raises as `read_records`.

    Of Parquet, CSV and TSV those are the columns.
    """
    if extension_of(url) == ".parquet":
        return parquet_columns(file), True
    records = read_records(file, url)
    names: dict[str, None] = {}
    for record in islice(records, _FIRST_RECORDS):
        if not isinstance(record, BadRecord):
            names |= dict.fromkeys(record[1])
    is_whole = next(records, None) is None
    return list(names), bool(names) and (is_whole or ".jsonl" not in extension_of(url))


def _unpacked(file: BinaryIO, codec: str) -> Read:
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)

    def read(size: int) -> bytes:
        try:
            content: bytes = stream.read(size)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"its compression by {codec} is damaged ({error})") from None
        return content

    return read


def _text(read: Read, limit: int) -> Iterator[Record]:
    content = bytearray()
    while part := read(min(READ_BYTES, limit + 1 - len(content))):
        content += part
        if len(content) > limit:
            raise BadData(f"the file is larger than {limit} bytes, the most for one record")
    yield 0, {"text": decode_text(bytes(content.removeprefix(BOM)))}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # no reader knows which of two values is meant
        names = [name for name, _ in pairs]
        raise BadData(f'the key "{next(name for name in names if names.count(name) > 1)}" occurs twice')
    return record


_DECODE = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
_DECODE_ONE_KEY = json.JSONDecoder().raw_decode


def _json_lines(read: Read, limit: int) -> Iterator[Record | BadRecord]:
    index = -1
    for index, line in enumerate(lines_of(read, limit)):
        if line is None or line.strip():
            yield _line_record(index, line, limit)
    if index < 0:
        yield BadRecord(0, "the file is empty")


def _line_record(index: int, line: bytes | None, limit: int) -> Record | BadRecord:
    where = f"line {index + 1}"
    if line is None:
        return BadRecord(index, f"{where}: longer than {limit} bytes, the most for one record")
    try:
        text = decode_text(line.removeprefix(BOM) if index == 0 else line).strip(" \t\r\n")
        # `json.loads` takes longer for a short text, and a single colon is no key twice.
        value, end = _DECODE_ONE_KEY(text) if text.count(":") == 1 else _DECODE(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except BadData as error:
        return BadRecord(index, f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        return BadRecord(index, f"{where}: broken JSON ({error})")
    if not isinstance(value, dict):
        return BadRecord(index, f"{where}: the JSON is {type(value).__name__}, not an object")
    return index, value


def _path(url: str) -> str:
    """The path of a URL, without the query of a web address."""
    parts = urlsplit(url)
    return parts.path if parts.scheme in ("http", "https") else url


KEYS = ("key", "file")
"""The columns of side data that may name its object, the first that does counts."""


def _key(value: Any) -> str:
    if isinstance(value, NotText):
        return value.shown or ""
    return "" if value is None else str(value)


def _unreadable_named(url: str, records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    try:
        yield from records
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
    def load(cls, files: Iterable[tuple[str, Iterable[Record | BadRecord]]]) -> SideData:
        """Join the records of files, each with the URL of its file.

        Raises UserError on a row without a key, on a repeated key, and on an unreadable file.
        """
        rows: dict[str, dict[str, Any]] = {}
        bad: list[tuple[str, BadRecord]] = []
        for url, records in files:
            for record in _unreadable_named(url, records):
                if isinstance(record, BadRecord):
                    bad.append((url, record))
                    continue
                index, fields = record
                column = next((name for name in KEYS if _key(fields.get(name))), None)
                if column is None:
                    raise UserError(f"{url}: row {index} has no key; give every row a `key` or a `file` column")
                key = _key(fields.pop(column))
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
