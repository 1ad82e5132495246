"""An object as a seekable file that reads ahead: blocks that grow while reading goes on in order.

In: a file system of buckets and a name. Out: a binary file. A jump costs one small block; a stream has one large block
under way while the last one is used, so that at most `_HELD` + 1 blocks of `LARGEST` bytes are in memory. Blocks are of
the version that was opened: an object that is replaced meanwhile is an error, not a mixture.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import obstore

from storage.object_store.errors import past_end
from storage.seekable import SeekableReader

if TYPE_CHECKING:
    from storage.object_store.filesystem import BucketFileSystem

FIRST = 2**18
LARGEST = 2**23
_GROWTH = 4
_HELD = 3
_PIECE = 2**20
_BUFFER = 2**16  # of Python's own file, for short reads and lines


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
    pieces: Future[list[bytes]]


class ReadAheadFile(SeekableReader):
    """Not for several threads at once; wrapped by `opened`, it is."""

    def __init__(self, fs: BucketFileSystem, path: str) -> None:
        super().__init__()
        self._fs, self._path = fs, path
        self._ahead: _Ahead | None = None
        self._thread: ThreadPoolExecutor | None = None
        meta, pieces = fs.ask(path, "read", _first)
        self.size, self._etag = int(meta["size"]), meta["e_tag"]
        self._blocks = [_Block(0, min(FIRST, self.size), pieces)]

    @classmethod
    def opened(cls, fs: BucketFileSystem, path: str) -> BinaryIO:
        """The file, with what every file of Python has. Raises FileNotFoundError, StoreError; so does reading."""
        return cast(BinaryIO, io.BufferedReader(cls(fs, path), _BUFFER))

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
        self._blocks = [*self._blocks[1 - _HELD :], block]
        if in_order and block.end < self.size:
            self._drop_ahead()
            self._start_ahead(block.end, self._next_end(block))
        return block

    def _next_end(self, before: _Block) -> int:
        return min(before.end + min((before.end - before.start) * _GROWTH, LARGEST), self.size)

    def _pieces(self, start: int, end: int) -> Callable[[Any, str], list[bytes]]:
        """The request for these bytes of the version that was opened."""
        options: Any = {"range": (start, end), "if_match": self._etag}
        return lambda store, key: list(obstore.get(store, key, options=options).stream(_PIECE))

    def _fetch(self, start: int, end: int) -> _Block:
        return _Block(start, end, self._fs.ask(self._path, "read", self._pieces(start, end)))

    def _start_ahead(self, start: int, end: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")  # obstore's asyncio costs more CPU
        client, key = self._fs.client(self._path)
        self._ahead = _Ahead(start, end, self._thread.submit(client.request, self._pieces(start, end), key))

    def _arrived(self, ahead: _Ahead) -> _Block:
        self._ahead = None
        with contextlib.suppress(Exception):  # asked again below, patiently, and told if that fails
            return _Block(ahead.start, ahead.end, ahead.pieces.result())
        return self._fetch(ahead.start, ahead.end)

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._ahead.pieces.cancel()
            self._ahead = None


def _first(store: Any, key: str) -> tuple[Any, list[bytes]]:
    """What the object is, and its first block."""
    try:
        got = obstore.get(store, key, options={"range": (0, FIRST)})
    except obstore.exceptions.BaseError as error:
        if not past_end(error):  # of an empty object
            raise
        return obstore.head(store, key), []
    return got.meta, list(got.stream(_PIECE))
