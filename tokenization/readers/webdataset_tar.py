"""A WebDataset tar of raw media (img2dataset, video2dataset) to samples, member by member.

In: a seekable binary file. Out: one `Sample` for each run of members whose names are equal up to the first dot of the
file name: a video or an image, the fields of a `.json` member, and the text of a `.txt` member as `caption`. Other
members of a sample are ignored. A `BadSample` replaces a sample that cannot be used; one without a key replaces all
that follow damage of the tar itself.

Members that belong to no sample are passed over: as by webdataset those without a dot, or with nothing before it, in
their names (LICENSE, .DS_Store, macOS's ._x.jpg), and what people and file managers put beside data (README.md, tables,
checksums).

A medium is not read: its sample says where it lies. Names of members serve as keys only; links, devices and folders are
not followed.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from storage.errors import BadData
from tokenization.media.kinds import MediaKind, kind_by_name
from tokenization.readers.record import BOM, MAX_RECORD_BYTES, decode_text

HEADER_BYTES = 1 << 16  # the largest long name or extended header
HEADERS_BYTES = 1 << 20  # the most bytes of headers before one member's content
BLOCK = tarfile.BLOCKSIZE
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog)\.(txt|cff|bib)|"
    r".*\.(md|rst|html?|pdf|csv|tsv|jsonl|parquet|py|ya?ml|log|idx|md5|sha\d+)|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sample:
    """One sample. number: its place among all samples of the tar, from 0. member: the name of the medium's member.
    offset, size: the place of its bytes in the tar. side: the other fields.
    """

    number: int
    key: str
    member: str
    kind: MediaKind
    offset: int
    size: int
    side: dict[str, Any]


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used and the reason; without a key, the damaged rest of the tar."""

    number: int
    key: str | None
    reason: str


def read_samples(file: BinaryIO, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Sample | BadSample]:
    """The samples of a tar, in order.

    Raises no error of its own: damage ends the iteration with a `BadSample`. Errors of the file pass through.
    """
    number, where = 0, "from its beginning"
    seen: set[str] = set()
    members = ((*_split(_name(member)), member) for member in _members(file) if _is_of_a_sample(member))
    try:
        for number, (key, group) in enumerate(groupby(members, itemgetter(0))):
            where = f"from sample {number} ({key}) on"
            try:
                if key in seen:
                    raise _UnusableError("its key occurs in the tar twice, with other samples between")
                sample: Sample | BadSample = _sample(file, number, key, group, max_record_bytes)
            except _UnusableError as error:
                sample = BadSample(number, key, str(error))
            for _ in group:  # damage within the rest of a bad sample is the tar's
                pass
            yield sample
            del sample  # before the next one is read
            seen.add(key)
    except BadData as error:
        yield BadSample(number, None, f"the tar is damaged {where}: {error}")


def _is_of_a_sample(member: tarfile.TarInfo) -> bool:
    folder, _, base = member.name.rpartition("/")
    is_named = "." in base and not base.startswith(".") and not _BESIDE_DATA.fullmatch(base)
    return is_named and not member.isdir() and "__MACOSX" not in folder.split("/")


class _UnusableError(Exception):
    """The reason why a sample cannot be used."""


def _sample(
    file: BinaryIO, number: int, key: str, members: Iterable[tuple[str, str, tarfile.TarInfo]], limit: int
) -> Sample:
    """The sample of these members, with the first medium, unless that is an image and a video follows."""
    sample: Sample | None = None
    side: dict[str, dict[str, Any]] = {}
    for _, extension, member in members:
        if not member.isreg() or member.issparse():
            raise _UnusableError(f"its member .{extension} is no plain file")
        if extension in side:
            raise _UnusableError(f"two members have the extension .{extension}")
        side[extension] = {}
        kind = kind_by_name(member.name)
        if kind and (sample is None or (kind == "video" and sample.kind == "image")):
            sample = Sample(number, key, _name(member), kind, member.offset_data, member.size, {})
        elif extension in ("json", "txt"):
            if member.size > limit:
                raise _UnusableError(f"its .{extension} is larger than {limit} bytes")
            side[extension] = _side_fields(_read(file, member), extension)
    if sample is None:
        others = ", ".join(f".{name}" for name in sorted(side)) or "nothing"
        raise _UnusableError(f"no video or image in it, only {others}")
    return replace(sample, side={**side.get("json", {}), **side.get("txt", {})})


def _side_fields(content: bytes, extension: str) -> dict[str, Any]:
    try:
        text = decode_text(content.removeprefix(BOM))
        fields = json.loads(text) if extension == "json" else {"caption": text.strip("\r\n")}
    except (BadData, ValueError, RecursionError) as error:
        raise _UnusableError(f"its .{extension} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise _UnusableError(f"its .json is {type(fields).__name__}, not an object")
    return fields


def _split(name: str) -> tuple[str, str]:
    """Key and extension (all after the first dot of the file's name, lower case), as webdataset splits them."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _name(member: tarfile.TarInfo) -> str:
    """The member's name as text that can be encoded as UTF-8."""
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members' headers, in order. Raises BadData if the tar is not whole, where tarfile would just end."""
    file.seek(0)
    start, end = file.read(6), 0
    if codec := next((name for mark, name in _COMPRESSIONS.items() if start.startswith(mark)), None):
        raise BadData(f"it is compressed by {codec}; unpack it")
    try:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps every member
                headers.taken = 0
                if member.size < 0 or member.offset_data < end:
                    raise BadData(f"the header at byte {member.offset} overlaps what is before it")
                end = member.offset_data + (0 if member.issparse() else member.size)  # a sparse size includes holes
                yield member
                if end > headers.end:
                    raise BadData(f"it ends at byte {headers.end}, inside a member")
            _check_end(file, tar.offset)
    except (tarfile.TarError, ValueError, RecursionError, EOFError, OverflowError) as error:
        raise BadData(f"{error} at byte {end}") from None


class _Headers:
    """The file as tarfile reads it for headers: none can make it read much, or seek beyond the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.end = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.tell = file.tell
        self.taken = 0  # bytes since the last member

    def read(self, size: int) -> bytes:
        self.taken += size
        if not 0 <= size <= HEADER_BYTES or self.taken > HEADERS_BYTES:
            raise BadData(f"a header of {self.taken} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise BadData("a header points to bytes before the beginning")
        if offset > self.end:  # where some stores raise errors of their own
            raise BadData(f"it ends at byte {self.end}, inside a member")
        return self._file.seek(offset)


def _check_end(file: BinaryIO, offset: int) -> None:
    file.seek(offset)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise BadData(f"it ends at byte {offset + len(mark)} without an end mark")
    if any(mark):
        raise BadData(f"no header of a member at byte {offset}")
    while rest := file.read(1 << 20):
        if rest.count(0) < len(rest):
            raise BadData(f"more data follows its end mark at byte {offset}")


def _read(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    content = bytearray()
    while len(content) < member.size and (part := file.read(member.size - len(content))):
        content += part
    if len(content) < member.size:
        raise BadData(f"it ends at byte {member.offset_data + len(content)}, inside a member")
    return bytes(content)
