"""Damage to a file: bits flipped, ends cut off, parts overwritten, left out, repeated, moved, or from another file.

In: hypothesis, which draws the edits; a file's bytes and another's. Out: the bytes after the edits. An edit prints as
the call that makes it, and says places in shares of the file, so that it means the same in one that is a little longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Literal, NamedTuple

from hypothesis import strategies as st

Kind = Literal["flip", "fill", "cut", "behead", "drop", "insert", "repeat", "move", "graft", "splice"]
_WHOLE = 1 << 16  # a place at the end of the file


class Edit(NamedTuple):
    """One edit. at, source: places in 65536ths of the file. size: bytes. value: a bit, a byte, a count or a seed."""

    kind: Kind
    at: int
    size: int = 1
    value: int = 0
    source: int = 0

    def applied(self, content: bytes, other: bytes) -> bytes:
        """The content after this edit; other: what grafts and splices take their bytes from."""
        at, end = _place(self.at, content), _place(self.at, content) + self.size
        head, part, tail = content[:at], content[at:end], content[end:]
        match self.kind:
            case "flip":
                return head + bytes(byte ^ 1 << self.value % 8 for byte in content[at : at + 1]) + content[at + 1 :]
            case "fill":
                return head + bytes([self.value]) * len(part) + tail
            case "cut":
                return head
            case "behead":
                return content[at:]
            case "drop":
                return head + tail
            case "insert":
                return head + Random(self.value).randbytes(self.size) + part + tail
            case "repeat":
                return head + part * (2 + self.value % 16) + tail
            case "move" | "graft":
                giver = content if self.kind == "move" else other
                start = _place(self.source, giver)
                return head + giver[start : start + self.size] + tail
            case "splice":
                return head + other[_place(self.source, other) :]


def edited(content: bytes, edits: Iterable[Edit], other: bytes) -> bytes:
    """The content after all edits, in order."""
    for edit in edits:
        content = edit.applied(content, other)
    return content


def several_edits() -> st.SearchStrategy[tuple[Edit, ...]]:
    """One to four edits, more of them at the ends of the file, where formats have their headers and footers."""
    ends = st.one_of(st.integers(0, _WHOLE // 32), st.integers(_WHOLE - _WHOLE // 32, _WHOLE))
    place = st.one_of(st.integers(0, _WHOLE), st.integers(0, _WHOLE), ends)
    size = st.one_of(st.integers(1, 8), st.integers(1, 600))
    value = st.one_of(st.sampled_from([0, 1, 0x22, 0x7F, 0x80, 0xFF]), st.integers(0, 255))
    small = st.sampled_from(["flip", "flip", "fill", "cut", "behead"])
    large = st.sampled_from(["drop", "insert", "repeat", "move", "graft", "splice"])
    edit = st.builds(Edit, st.one_of(small, large), place, size, value, place)
    return st.lists(edit, min_size=1, max_size=4).map(tuple)


def _place(share: int, content: bytes) -> int:
    return share * len(content) // _WHOLE
