"""An object as a seekable file that reads ahead: blocks that grow while reading goes on in order.

In: a file system of buckets and a name. Out: a binary file. A jump costs one small block; a stream has one large block
under way while the last one is used, so that at most `_HELD` + 1 blocks of `LARGEST` bytes are in memory. Blocks are of
the version that was opened: an object that is replaced meanwhile is an error, not a mixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import obstore
from fsspec.asyn import get_loop

if TYPE_CHECKING:
    from pipelines.buckets.filesystem import BucketFileSystem

FIRST = 2**18
LARGEST = 2**23
_GROWTH = 4
_HELD = 3
_BUFFER = 2**16  # of Python's own file, for short reads and lines


class _Block(NamedTuple):
    start: int
    data: memoryview

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class _Ahead(NamedTuple):
    start: int
    end: int
    body: Future[Any]


class ReadAheadFile(io.RawIOBase):
    """Not for several threads at once; wrapped by `opened`, it is."""

    def __init__(self, fs: BucketFileSystem, path: str) -> None:
        super().__init__()
        self._fs, self._path, self._position = fs, path, 0
        self._ahead: _Ahead | None = None
        meta, data = fs.ask(path, "read", _first)
        self.size, self._etag = int(meta["size"]), meta["e_tag"]
        self._blocks = [_Block(0, memoryview(data))]

    @classmethod
    def opened(cls, fs: BucketFileSystem, path: str) -> BinaryIO:
        """The file, with what every file of Python has. Raises FileNotFoundError, StoreError; so does reading."""
        return cast(BinaryIO, io.BufferedReader(cls(fs, path), _BUFFER))

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always; seeking asks the store nothing."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; beyond the end there is nothing to read."""
        position = (0, self._position, self.size)[whence] + offset
        if position < 0:
            raise ValueError(f"{self._fs.url(self._path)}: no byte {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here as far as a block goes; 0 at the end."""
        if self._position >= self.size:
            return 0
        view = memoryview(buffer).cast("B")
        block = self._block_at(self._position)
        piece = block.data[self._position - block.start :][: len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Let go of the blocks, and of the one under way."""
        if not self.closed:
            self._drop_ahead()
            self._blocks = []
        super().close()

    def _block_at(self, position: int) -> _Block:
        for block in self._blocks:
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
        return min(before.end + min(len(before.data) * _GROWTH, LARGEST), self.size)

    def _fetch(self, start: int, end: int) -> _Block:
        options: Any = {"range": (start, end), "if_match": self._etag}
        read = self._fs.ask(self._path, "read", lambda store, key: obstore.get(store, key, options=options).bytes())
        return _Block(start, memoryview(read))

    def _start_ahead(self, start: int, end: int) -> None:
        client, key = self._fs.client(self._path)
        options: Any = {"range": (start, end), "if_match": self._etag}

        async def body() -> Any:
            return await (await obstore.get_async(client.store, key, options=options)).bytes_async()

        self._ahead = _Ahead(start, end, asyncio.run_coroutine_threadsafe(body(), get_loop()))

    def _arrived(self, ahead: _Ahead) -> _Block:
        self._ahead = None
        with contextlib.suppress(Exception):  # asked again below, patiently, and told if that fails
            return _Block(ahead.start, memoryview(ahead.body.result()))
        return self._fetch(ahead.start, ahead.end)

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._ahead.body.cancel()
            self._ahead = None


def _first(store: Any, key: str) -> tuple[Any, Any]:
    """What the object is, and its first block."""
    try:
        got = obstore.get(store, key, options={"range": (0, FIRST)})
    except obstore.exceptions.BaseError as error:
        if "416" not in str(error).partition("<")[0]:  # how S3 answers of an empty object
            raise
        return obstore.head(store, key), b""
    return got.meta, got.bytes()
