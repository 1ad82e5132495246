"""A remote object as a seekable file, by one of two policies of what to ask for.

`RangedFile` asks for exactly the bytes of each read, for who knows what is where: single sequences of a shard would
cost many times their bytes by any other. `ReadAheadFile` asks for blocks that grow while reading goes on in order: a
jump costs one small block, and a stream has one large block under way while the last one is used.

In: an object's byte ranges, which are repeated and resumed below. Out: a binary file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from storage.object_store.errors import Request, StoreError
from storage.object_store.ranges import Answer, ObjectRanges
from storage.retry import REQUEST, Backoff, retry
from storage.seekable import SeekableReader

FIRST = 2**18
LARGEST = 2**23
_GROWTH = 4
_BLOCKS = 3  # in memory, besides the one under way
_PIECE = 2**20
_BUFFER = 2**16  # of Python's own file, for short reads and lines
_CLIENT_LIBRARIES = {"aiohttp", "http", "urllib3"}


class Ranges(Protocol):
    """The bytes of an object."""

    def size(self) -> int:
        """How many there are."""

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Those from `start` to `end`, fewer only where the object ends."""


class RangedFile(SeekableReader):
    """Each read is one request for exactly its bytes. Not for several threads at once.

    Reading raises FileNotFoundError where there is no such object, else StoreError naming object and store.
    """

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges = ranges

    def _end(self) -> int:
        return self._ranges.size()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here; fewer bytes only where the object ends."""
        view = memoryview(buffer).cast("B")
        n_bytes = 0
        for piece in self._ranges.pieces(self._position, self._position + len(view)):
            view[n_bytes : n_bytes + len(piece)] = memoryview(piece)
            n_bytes += len(piece)
        self._position += n_bytes
        return n_bytes


class FileRanges:
    """The bytes of a file on an fsspec file system other than ours, whose errors are of many kinds."""

    def __init__(self, fs: Any, path: str, url: str, backoff: Backoff = REQUEST) -> None:
        self._fs, self._path, self._request, self._backoff = fs, path, Request(url, "read"), backoff

    def size(self) -> int:
        """Of the file, in bytes."""
        return int(self._fs.size(self._path))

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Those from `start` to `end`, by one request that is repeated while its errors are transient."""
        what = f"{self._request.url}: cannot be read just now"
        yield retry(lambda: self._get(start, end), what, self._backoff, topic=what)

    def _get(self, start: int, end: int) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._path, start, end))
        except Exception as error:  # client libraries raise what they like
            status = getattr(error, "status", None)  # aiohttp's
            if status == 416:  # the range begins at or after the end
                return b""
            if isinstance(error, FileNotFoundError) or status == 404:
                raise FileNotFoundError(self._request.url) from None
            if isinstance(error, StoreError) or not (status or isinstance(error, OSError) or _is_clients(error)):
                raise
            may_pass = status >= 500 or status == 429 if status else not isinstance(error, PermissionError)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._request.failure(reason, "transient" if may_pass else "refused") from None


def _is_clients(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENT_LIBRARIES


class _Block(NamedTuple):
    """Bytes of an object from `start` to `end`, in the pieces that they came in: joining them would cost a copy."""

    start: int
    end: int
    pieces: list[bytes]

    def at(self, position: int) -> memoryview:
        """From a byte of the block to the end of its piece."""
        start = self.start
        for piece in self.pieces:
            if position < start + len(piece):
                return memoryview(piece)[position - start :]
            start += len(piece)
        raise EOFError(f"{self.end - start} bytes fewer came than were asked for")


class _Ahead(NamedTuple):
    start: int
    end: int
    answer: Future[Answer]


class ReadAheadFile(SeekableReader):
    """Reads in blocks, one ahead. Not for several threads at once; wrapped by `opened`, it is.

    All blocks are of the version that was opened. At most `_BLOCKS` + 1 of `LARGEST` bytes are in memory.
    """

    def __init__(self, ranges: ObjectRanges) -> None:
        super().__init__()
        self._ranges = ranges
        self._ahead: _Ahead | None = None
        self._thread: ThreadPoolExecutor | None = None
        self.size, self._etag, pieces = ranges.first(FIRST, _PIECE)
        self._blocks = [_Block(0, min(FIRST, self.size), pieces)]

    @classmethod
    def opened(cls, ranges: ObjectRanges) -> BinaryIO:
        """The file, with what every file of Python has. Raises FileNotFoundError, StoreError; so does reading."""
        return cast(BinaryIO, io.BufferedReader(cls(ranges), _BUFFER))

    def _end(self) -> int:
        return self.size

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here as far as a block goes; 0 at the end."""
        if self._position >= self.size:
            return 0
        view = memoryview(buffer).cast("B")
        piece = self._block_at(self._position).at(self._position)[: len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Let go of the blocks, and of the one under way."""
        if not self.closed:
            self._drop_ahead()
            if self._thread:
                self._thread.shutdown(wait=False)
            self._blocks = []
        super().close()

    def _block_at(self, position: int) -> _Block:
        for block in reversed(self._blocks):
            if block.start <= position < block.end:
                return block
        if self._ahead and self._ahead.start <= position < self._ahead.end:
            block, in_order = self._arrived(self._ahead), True
        else:
            before = next((block for block in self._blocks if block.end == position), None)
            in_order = before is not None
            block = self._fetch(position, self._next_end(before) if before else min(position + FIRST, self.size))
        self._blocks = [*self._blocks[1 - _BLOCKS :], block]
        if in_order and block.end < self.size:
            self._drop_ahead()
            self._start_ahead(block.end, self._next_end(block))
        return block

    def _next_end(self, before: _Block) -> int:
        return min(before.end + min((before.end - before.start) * _GROWTH, LARGEST), self.size)

    def _fetch(self, start: int, end: int, came: Answer | None = None) -> _Block:
        """came: what an attempt before brought of it."""
        pieces, n_bytes = (came.pieces, came.n_bytes) if came else ([], 0)
        return _Block(start, end, [*pieces, *self._ranges.pieces(start + n_bytes, end, self._etag, _PIECE)])

    def _start_ahead(self, start: int, end: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")  # obstore's asyncio costs more CPU
        self._ahead = _Ahead(start, end, self._thread.submit(self._ranges.attempt, start, end, self._etag, _PIECE))

    def _arrived(self, ahead: _Ahead) -> _Block:
        self._ahead, came = None, None
        with contextlib.suppress(Exception):  # the rest is asked for again, and raises if it fails for good
            came = ahead.answer.result()
        return self._fetch(ahead.start, ahead.end, came)

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._ahead.answer.cancel()
            self._ahead = None
