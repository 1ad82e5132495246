"""Tables as text, `.csv` and `.tsv`, to records: the first row names the columns, every value is text.

RFC 4180: a value in double quotes may hold the delimiter, line feeds, and its quotes doubled.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator

from storage.errors import BadData
from tokenization.readers.record import BOM, BadRecord, Record, lines_of

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_csv(
    read: Callable[[int], bytes], extension: str, columns: Collection[str] | None, limit: int
) -> Iterator[Record | BadRecord]:
    """Records with their row's number from 0, the header not counted. Raises BadData on a bad header."""
    csv.field_size_limit(limit)
    lines = _Lines(read, limit)
    rows = csv.reader(lines, delimiter=_DELIMITERS[extension])
    header = _header(rows, lines)
    if header is None:
        yield BadRecord(0, "the file is empty")
        return
    if twice := [name for name in header if header.count(name) > 1 and (columns is None or name in columns)]:
        raise BadData(f'the column "{twice[0]}" occurs twice')
    places = [(place, name) for place, name in enumerate(header) if columns is None or name in columns]
    index = -1
    while True:
        index += 1
        lines.is_too_long = False
        try:
            row = next(rows)
            if not row and not lines.is_too_long:
                continue
            reason = _why_bad(row, header, lines)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"row {index}: {error}"
        else:
            reason = reason and f"row {index}: {reason}"
        yield BadRecord(index, reason) if reason else (index, {name: row[place] for place, name in places})


def _header(rows: Iterator[list[str]], lines: _Lines) -> list[str] | None:
    try:
        row = next(rows)
    except StopIteration:
        return None
    except csv.Error as error:
        raise BadData(f"its first row, which is to name the columns, cannot be read: {error}") from None
    if reason := _why_bad(row, row, lines):
        raise BadData(f"its first row, which is to name the columns, cannot be read: {reason}")
    return row


def _why_bad(row: list[str], header: list[str], lines: _Lines) -> str:
    if lines.is_too_long:
        return f"longer than {lines.limit} bytes, the most for one record"
    if lines.has_ended:  # which `csv` asks for only where it is in the middle of a row
        return "the file ends in a value whose quotes are not closed"
    for value in row:
        if not value.isascii() and (bad := next((c for c in value if "\udc80" <= c <= "\udcff"), "")):
            return f"not UTF-8: byte 0x{ord(bad) - 0xDC00:02x}"
        if "\0" in value:
            return "not text: a NUL byte"
    if len(row) != len(header):
        return f"{len(row)} values, where the first row has {len(header)}"
    return ""


class _Lines:
    """Lines for `csv`. is_too_long: whether one of them since it was last set had to be left out. has_ended: whether
    one more has been asked for than there are."""

    def __init__(self, read: Callable[[int], bytes], limit: int) -> None:
        self.limit, self.is_too_long, self.has_ended = limit, False, False
        self._lines = lines_of(read, limit)
        self._is_first = True

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.has_ended = True
            raise
        if self._is_first and line is not None:
            line = line.removeprefix(BOM)
        self._is_first = False
        self.is_too_long |= line is None
        return "\n" if line is None else line.decode("utf-8", "surrogateescape") + "\n"
