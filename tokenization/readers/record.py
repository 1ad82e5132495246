"""A record of a text-like file, or one that cannot be used; and how much of a file is one record at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from storage.errors import BadData

MAX_RECORD_BYTES = 64 << 20  # a book of several million tokens is 10 to 20 MB
READ_BYTES = 1 << 20
BAD_LINES = 100  # bad lines after which a file of mostly bad lines is refused
BOM = b"\xef\xbb\xbf"

Record = tuple[int, dict[str, Any]]
"""The record's index in its file (line or row from 0, blank and bad ones counted) and its fields."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its index and the reason."""

    index: int
    reason: str


@dataclass(frozen=True)
class NotText:
    """A value that is neither text nor a medium: the name of its type, and how it reads where it is a number."""

    type_name: str
    shown: str | None = None


def decode_text(content: bytes) -> str:
    """Decode UTF-8. Raises BadData with the offset of the first byte that is none, or of a NUL (UTF-16 has many)."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None
    if (place := content.find(0)) >= 0:
        raise BadData(f"not text: a NUL byte at offset {place}")
    return text


def lines_of(read: Callable[[int], bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their line feed; None for a line longer than the limit, which is skipped."""
    held = bytearray()
    too_long = False
    while part := read(READ_BYTES):
        *ended, rest = part.split(b"\n")
        for end in ended:
            if held or too_long or len(end) > limit:
                yield None if too_long or len(held) + len(end) > limit else bytes(held + end)
                held.clear()
                too_long = False
            else:  # nearly always, and then without a copy
                yield end
        too_long = too_long or len(held) + len(rest) > limit
        if too_long:
            held.clear()
        else:
            held += rest
    if held or too_long:
        yield None if too_long else bytes(held)


def unless_mostly_bad(records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    """The same records. Raises BadData where over `BAD_LINES` and most are bad; the bad wait for the first good one."""
    waiting: list[BadRecord] = []
    good = bad = 0
    for record in records:
        if not isinstance(record, BadRecord):
            good += 1
            if waiting:
                yield from waiting
                waiting = []
            yield record
            continue
        bad += 1
        if bad > max(BAD_LINES, good):
            lines = record.index + 1
            raise BadData(f"{bad} of its first {lines} lines are bad, the last because of {record.reason}")
        if good:
            yield record
        else:
            waiting.append(record)
    yield from waiting
