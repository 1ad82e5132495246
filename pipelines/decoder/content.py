"""The bytes that a decoder process reads, which its parent opens: the process needs no network and no credentials.

A file on a local disk is handed over as a descriptor, and the process reads it itself. What is elsewhere it asks its
parent for, a block at a time, by messages: `{"is": "read", "offset": .., "size": ..}`, answered by the number of bytes
(4 bytes) and the bytes, fewer than asked for at the end alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.decoder.messages import BrokenMessageError, receive_block, send, send_block
from storage.seekable import SeekableReader

if TYPE_CHECKING:
    from storage.reach import Reach

_LENGTH = struct.Struct("<I")
_BLOCK = 1 << 18  # that is asked for at least: FFmpeg and tarfile read little at a time
_LARGEST = 1 << 23


@dataclass(frozen=True)
class Content:
    """Where bytes are: those at a URL, or of a `file` that is open, or a window (offset, size) of either. reach: of the
    records of which one names the URL; None: a recipe does. etag: as a listing has it, of which another version is an
    error; None: whichever is there.
    """

    url: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    window: tuple[int, int] | None = None
    file: BinaryIO | None = None
    reach: Reach | None = None
    etag: str | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file with all the bytes, of which `window` may be a part. Raises OSError and UserError."""
        if self.file is not None:
            yield self.file
            return
        from storage import urls  # imported late: the process that only reads does without clients of stores

        if self.etag is None:
            opened = urls.open_url(self.url, self.options, self.reach)
        else:
            opened = urls.open_listed(self.url, self.etag, self.options)
        with opened as file:
            yield file


class Served:
    """The parent's end of an open file. fields: what the request says of it."""

    def __init__(self, content: Content, file: BinaryIO) -> None:
        self._file = file
        self.descriptor = _descriptor(file)
        start, size = content.window or (0, None)
        if size is None and self.descriptor is None:
            with contextlib.suppress(OSError, ValueError):  # a stream without an end to seek to
                size = file.seek(0, io.SEEK_END)
        self.fields = {"start": start, "size": size, "is_handed_over": self.descriptor is not None}

    def hand_over(self, connection: socket.socket) -> None:
        """Send the descriptor after the request, where there is one. Raises BrokenPipeError."""
        if self.descriptor is not None:
            socket.send_fds(connection, [b"\0"], [self.descriptor])

    def read(self, reply: dict[str, Any]) -> list[bytes]:
        """The bytes that the process asks for. Raises what reading raises, and BrokenMessageError on nonsense."""
        offset, size = reply.get("offset"), reply.get("size")
        if self.descriptor is not None or not isinstance(offset, int) or not isinstance(size, int):
            raise BrokenMessageError("it may not ask for that")
        if not 0 <= offset < 1 << 62 or not 0 < size <= _LARGEST:
            raise BrokenMessageError(f"{size} bytes at {offset}")
        if offset != self._file.tell():
            self._file.seek(offset)
        parts, wanted = [], size
        while wanted and (part := self._file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return parts


def send_read(to: int, parts: list[bytes]) -> None:
    """Send the process what has been read for it. Raises BrokenPipeError."""
    send_block(to, _LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        send_block(to, part)


def _descriptor(file: BinaryIO) -> int | None:
    """Of a plain file of this machine."""
    try:
        descriptor = file.fileno()
    except (OSError, AttributeError):
        return None
    return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


@contextlib.contextmanager
def received(connection: socket.socket, replies: int, fields: dict[str, Any]) -> Iterator[BinaryIO]:
    """The process's end: the file that a request is about, by the fields that the request has of it."""
    if fields["is_handed_over"]:
        _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
        try:
            size = fields["size"]
            size = os.fstat(descriptor).st_size - fields["start"] if size is None else size
            with io.BufferedReader(_Handed(descriptor, fields["start"], size), _BLOCK) as file:
                yield file
        finally:
            os.close(descriptor)
    else:
        with io.BufferedReader(_Asked(connection.fileno(), replies, fields["start"], fields["size"]), _BLOCK) as file:
            yield file


class _Handed(SeekableReader):
    """Bytes of a descriptor, whose position other processes share."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size

    def _end(self) -> int:
        return self._size

    def readinto(self, buffer: Any) -> int:
        """Read as much as one call returns."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        got = os.preadv(self._descriptor, [view], self._start + self._position) if len(view) else 0
        self._position += got
        return got


class _Asked(SeekableReader):
    """Bytes that the parent reads. size: None where nobody knows."""

    def __init__(self, answers: int, questions: int, start: int, size: int | None) -> None:
        self._answers, self._questions, self._start, self._size = answers, questions, start, size

    def _end(self) -> int:
        if self._size is None:
            raise io.UnsupportedOperation("a stream whose end is not known")
        return self._size

    def readinto(self, buffer: Any) -> int:
        """Read as much as the parent gives."""
        view = memoryview(buffer).cast("B")[:_LARGEST]
        if self._size is not None:
            view = view[: max(0, self._size - self._position)]
        if not len(view):
            return 0
        send(self._questions, {"is": "read", "offset": self._start + self._position, "size": len(view)})
        receive_block(self._answers, head := bytearray(_LENGTH.size))
        (got,) = _LENGTH.unpack(head)
        receive_block(self._answers, view[:got])
        self._position += got
        return int(got)
