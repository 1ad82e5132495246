"""A WebDataset tar of raw media (img2dataset, video2dataset) to samples, member by member.

In: a seekable binary file. Out: one `Sample` for each run of members whose names share what stands before the first dot
of the file name: a video or an image, the fields of a `.json` member, and the text of a `.txt` member as `caption`.
Other members are passed over. A sample that cannot be used is a `BadSample` in its place and costs itself; what follows
damage of the tar itself is one `BadSample` without a key.

Nothing is unpacked: a small medium is read into memory, of a large one it is told where it lies, for `Window` to read.
Names of members are keys and nothing else, whatever they look like; links, devices and folders are not followed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from storage.errors import BadData
from storage.seekable import SeekableReader
from tokenization.media.frames import MediaKind, kind_by_name
from tokenization.readers.records import BOM, MAX_RECORD_BYTES, decode_text

HELD_BYTES = 16 << 20  # a medium up to this size is held, a larger one read where it lies
HEADER_BYTES = 1 << 16  # of one long name or extended header
HEADERS_BYTES = 1 << 20  # of all that stand before one member's content
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """One sample. number: from 0, all samples of the tar counted. member: the name of the medium's member. offset,
    size: where its bytes lie in the tar. held: its bytes, where they are few. side: the other fields.
    """

    number: int
    key: str
    member: str
    kind: MediaKind
    offset: int
    size: int
    held: bytes | None
    side: dict[str, Any]


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why; without a key, the damaged rest of the tar."""

    number: int
    key: str | None
    reason: str


def read_samples(
    file: BinaryIO, wanted: Callable[[str], bool] = lambda key: True, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Sample | BadSample]:
    """The samples of a tar, in order; those with a key that is not `wanted` are counted and passed over unread.

    Raises nothing of its own: damage ends the iteration with a `BadSample`. Errors of the file pass through.
    """
    group: _Group | None = None
    seen: set[str] = set()
    try:
        for member in _members(file):
            if member.isdir():
                continue
            key, extension = _split(_name(member))
            if group is None or key != group.key:
                if group is not None:
                    yield from group.finished()
                group = _Group(group.number + 1 if group else 0, key, wanted(key))
                if key in seen:
                    group.flaw("its key stands in the tar twice, with other samples between")
                seen.add(key)
            if group.wanted:
                group.add(file, member, extension, max_record_bytes)
        if group is not None:
            yield from group.finished()
    except BadData as error:
        reason = f"from sample {group.number} ({group.key}) on" if group else "from its beginning"
        yield BadSample(group.number if group else 0, None, f"the tar is damaged {reason}: {error}")


@dataclass
class _Group:
    """Members of one sample so far. At most one medium is held: a video rather than an image, else the first."""

    number: int
    key: str
    wanted: bool
    medium: tuple[str, MediaKind, int, int, bytes | None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    caption: str | None = None
    reason: str | None = None
    extensions: set[str] = field(default_factory=set)

    def flaw(self, reason: str) -> None:
        self.reason = self.reason or reason

    def add(self, file: BinaryIO, member: tarfile.TarInfo, extension: str, limit: int) -> None:
        if not member.isreg() or member.issparse():
            self.flaw(f"its member .{extension} is no plain file")
            return
        if extension in self.extensions:
            self.flaw(f"two members have the extension .{extension}")
            return
        self.extensions.add(extension)
        kind = kind_by_name(member.name)
        if kind and (self.medium is None or (kind == "video" and self.medium[1] == "image")):
            held = _read(file, member) if member.size <= HELD_BYTES else None
            self.medium = (_name(member), kind, member.offset_data, member.size, held)
        elif extension in ("json", "txt"):
            if member.size > limit:
                self.flaw(f"its .{extension} is larger than {limit} bytes")
            else:
                self._read_side(_read(file, member), extension)

    def _read_side(self, content: bytes, extension: str) -> None:
        try:
            text = decode_text(content.removeprefix(BOM))
            value = json.loads(text) if extension == "json" else {}
        except (BadData, ValueError, RecursionError) as error:
            self.flaw(f"its .{extension} cannot be read: {error}")
            return
        if extension == "txt":
            self.caption = text.strip("\r\n")
        elif isinstance(value, dict):
            self.fields = value
        else:
            self.flaw(f"its .json is {type(value).__name__}, not an object")

    def finished(self) -> Iterator[Sample | BadSample]:
        if not self.wanted:
            return
        if self.reason is None and self.medium is None:
            others = ", ".join(f".{name}" for name in sorted(self.extensions)) or "nothing"
            self.reason = f"no video or image in it, only {others}"
        if self.reason is not None or self.medium is None:
            yield BadSample(self.number, self.key, self.reason or "")
            return
        side = self.fields if self.caption is None else {**self.fields, "caption": self.caption}
        yield Sample(self.number, self.key, *self.medium, side)


def _split(name: str) -> tuple[str, str]:
    """Key and extension (all after the first dot of the file's name, lower case), as webdataset splits them."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _name(member: tarfile.TarInfo) -> str:
    """The member's name as text that every format can hold."""
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members' headers, in order. Raises BadData where the tar is not whole: tarfile by itself ends quietly."""
    file.seek(0)
    end = 0
    try:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile remembers every member
                headers.taken = 0
                if member.size < 0 or member.offset_data < end:
                    raise BadData(f"the header at byte {member.offset} does not fit what stands before it")
                end = member.offset_data + (0 if member.issparse() else member.size)  # with the holes it is longer
                yield member
            _check_end(file, tar.offset)
    except (tarfile.TarError, ValueError, RecursionError, EOFError, OverflowError) as error:
        raise BadData(f"{error} at byte {end}") from None


class _Headers:
    """The file as tarfile reads it, which is headers: none makes it read much, or seek to where it is not."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.tell = file.tell
        self.taken = 0  # since the member before

    def read(self, size: int) -> bytes:
        self.taken += size
        if not 0 <= size <= HEADER_BYTES or self.taken > HEADERS_BYTES:
            raise BadData(f"a header of {self.taken} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise BadData("a header points to bytes before the beginning")
        if offset > self._end:  # some stores cannot seek that far, which would be no damage of the tar
            raise BadData(f"it ends at byte {self._end}, inside a member")
        return self._file.seek(offset)


def _check_end(file: BinaryIO, offset: int) -> None:
    file.seek(offset)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise BadData(f"it ends at byte {offset + len(mark)} without the mark of its end")
    if any(mark):
        raise BadData(f"no header of a member at byte {offset}")
    while rest := file.read(1 << 20):
        if rest.count(0) < len(rest):
            raise BadData(f"more follows the mark of its end at byte {offset}")


def _read(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    content = bytearray()
    while len(content) < member.size and (part := file.read(member.size - len(content))):
        content += part
    if len(content) < member.size:
        raise BadData(f"it ends at byte {member.offset_data + len(content)}, inside a member")
    return bytes(content)


class Window(SeekableReader):
    """The bytes of a member as a file of their own, buffered by the caller."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def _end(self) -> int:
        return self._size

    def readinto(self, buffer: Any) -> int:
        """Read what one read of the file gives."""
        size = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(size)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
