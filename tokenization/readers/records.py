"""Text-like objects to records, streamed: `.txt`, `.md` (a file is one record, {"text": ...}), `.jsonl`, `.csv`,
`.tsv`, each also compressed as `.gz` or `.zst`, and `.parquet`.

In: a binary file and its URL, whose extension selects the format. Out: (index, record) pairs one by one, with a
BadRecord in place of each bad record. An object that cannot be read at all, or of which most lines are bad, raises
BadData.

Memory holds one record and a buffer: a line longer than `max_record_bytes` is skipped.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Any, BinaryIO

import orjson

from storage.errors import BadData, UserError
from storage.public_url import path_of
from tokenization.readers.compressed import CODECS, unpacked
from tokenization.readers.csv_rows import read_csv
from tokenization.readers.parquet import parquet_columns, read_parquet
from tokenization.readers.record import (
    BOM,
    MAX_RECORD_BYTES,
    READ_BYTES,
    BadRecord,
    Record,
    decode_text,
    lines_of,
    unless_mostly_bad,
)

_PLAIN = (".txt", ".md", ".jsonl", ".csv", ".tsv")
_COMPRESSED = {*CODECS, ".bz2", ".xz"}
EXTENSIONS = (*_PLAIN, ".parquet", *(plain + packed for plain in _PLAIN for packed in CODECS))

_PLAIN_VALUES = {str, int, bool, type(None)}
_PLAIN_BYTES = 1 << 20  # of a longer line `json` runs out of memory with an error, where `orjson` would end the process

_FIRST_RECORDS = 1000  # that are looked at for the names of their fields

Read = Callable[[int], bytes]


def extension_of(url: str) -> str:
    """The extension of a URL or path, lower case; of a compressed file with that of what is compressed, `.jsonl.gz`."""
    stem, extension = posixpath.splitext(path_of(url).lower())
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
    read = unpacked(file, CODECS[packed]) if packed else file.read
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


def _plain_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line of which `json` would make the same, and None of any other, in a third of its time.

    `orjson` makes floats of large integers, goes deeper into lists and objects, and takes the last value of a key that
    occurs twice; else it accepts less. A line has a colon for each key, and those in its texts: no more, no key twice.
    """
    if len(line) > _PLAIN_BYTES:
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if type(record) is not dict or not _PLAIN_VALUES.issuperset(map(type, record.values())):
        return None
    n_keys = line.count(b":")
    if n_keys == len(record):
        return record
    for text in record.values():
        if type(text) is str:
            n_keys -= text.count(":")
    return record if n_keys == len(record) and b"\\u003" not in line else None  # \u003a is a colon that is not seen


def _json_lines(read: Read, limit: int) -> Iterator[Record | BadRecord]:
    index = -1
    for index, line in enumerate(lines_of(read, limit)):
        if line is not None and (plain := _plain_record(line)) is not None:
            yield index, plain
        elif line is None or line.strip():
            yield _line_record(index, line, limit)
    if index < 0:
        yield BadRecord(0, "the file is empty")


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
