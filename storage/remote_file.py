"""A remote object as a seekable file, with one of two policies of what to request.

`RangedFile` requests exactly the bytes of each read, for code that knows its offsets: with any other policy, single
sequences of a shard would cost many times their bytes. `ReadAheadFile` requests blocks that grow while reading is in
order: a jump costs one small block, and a stream has one large block under way while the last one is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import obstore

from storage.errors import UserError
from storage.object_store.client import Client
from storage.object_store.errors import Request, StoreError
from storage.retry import Backoff, retry
from storage.seekable import SeekableReader

FIRST = 2**18
LARGEST = 2**23
_GROWTH = 4
_BLOCKS = 3  # in memory, besides the one under way
_PIECE = 2**20  # a larger one costs less, and more of it is requested again after a cut
_CLIENT_LIBRARIES = {"aiohttp", "http", "urllib3"}


class ObjectRanges:
    """The bytes of an object in a bucket. Raises FileNotFoundError where there is none, else StoreError.

    A request that is cut is continued at the byte where it stopped, for the same version (`etag`): an object that is
    replaced meanwhile is an error, not a mixture. A request that brought bytes resets the count of attempts.
    version: the only ETag that `first` takes, None: any.
    """

    def __init__(self, client: Client, key: str, backoff: Backoff | None = None, version: str | None = None) -> None:
        self._client, self._key, self._backoff, self._version = client, key, backoff, version

    def once(self) -> ObjectRanges:
        """The same bytes, by requests that are not repeated."""
        return ObjectRanges(self._client, self._key, Backoff(attempts=1, pause=0.0))

    def size(self) -> int:
        """Of the object, in bytes."""
        return int(self._ask(obstore.head)["size"])

    def first(self, n_bytes: int) -> tuple[int, str | None, list[bytes]]:
        """Size and version (ETag) of the object, and its first bytes, fewer where the connection is cut."""
        request = partial(_get, start=0, end=n_bytes, etag=self._version, piece_bytes=_PIECE)
        pieces, meta, _ = self._ask(request)
        if meta is None:  # an empty object has no range
            options: Any = {"if_match": self._version} if self._version else {}
            meta = self._ask(lambda store, key: obstore.get(store, key, options=options).meta)
        return meta["size"], meta["e_tag"], pieces

    def pieces(self, start: int, end: int, etag: str | None = None, piece_bytes: int = 1) -> Iterator[bytes]:
        """The bytes from `start` to `end`, fewer only at the object's end, in pieces of at least `piece_bytes`."""
        while start < end:
            request = partial(_get, start=start, end=end, etag=etag, piece_bytes=piece_bytes)
            pieces, meta, is_complete = self._ask(request)
            yield from pieces
            if is_complete:
                return
            start, etag = start + sum(map(len, pieces)), meta["e_tag"]

    def _ask(self, make: Any) -> Any:
        return self._client.ask("read", make, self._key, self._backoff)


def _get(
    store: Any, key: str, start: int, end: int, etag: str | None, piece_bytes: int
) -> tuple[list[bytes], Any, bool]:
    """What one request brings: pieces, the object's meta (None after its end), and whether the request was not cut."""
    pieces: list[bytes] = []
    meta, is_complete = None, True
    try:
        got = obstore.get(store, key, options={"range": (start, end), **({"if_match": etag} if etag else {})})
        meta = got.meta
        for piece in got.stream(piece_bytes):
            pieces.append(piece)
    except (OSError, ValueError, obstore.exceptions.BaseError) as error:
        is_complete = "status code: 416" in str(error)  # S3's answer where the range begins at the end or after it
        if not pieces and not is_complete:
            raise
    return pieces, meta, is_complete


class FileRanges:
    """The bytes of a file on an fsspec file system other than ours, whose errors are of many kinds."""

    def __init__(self, fs: Any, path: str, url: str, backoff: Backoff) -> None:
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
        except Exception as error:  # client libraries raise errors of their own
            status = getattr(error, "status", None)  # aiohttp's
            if status == 416:  # the range begins at or after the end
                return b""
            if isinstance(error, FileNotFoundError) or status == 404:
                raise FileNotFoundError(self._request.url) from None
            is_clients = type(error).__module__.partition(".")[0] in _CLIENT_LIBRARIES
            if isinstance(error, StoreError) or not (status or isinstance(error, OSError) or is_clients):
                raise
            is_transient = status >= 500 or status == 429 if status else not isinstance(error, PermissionError)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._request.failure(reason, "transient" if is_transient else "refused") from None


class Ranges(Protocol):
    """The bytes of an object, of which any can be requested."""

    def size(self) -> int:
        """Of the object, in bytes."""

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, fewer only at the object's end."""


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


class ReadableAhead(Protocol):
    """The bytes of an object of which one version is read, as `ObjectRanges` has them."""

    def once(self) -> ReadableAhead:
        """The same bytes, by requests that are not repeated; what fails raises OSError or UserError."""

    def first(self, n_bytes: int) -> tuple[int, str | None, list[bytes]]:
        """Size and version of the object, and its first bytes or some of them."""

    def pieces(self, start: int, end: int, etag: str | None = None, piece_bytes: int = 1) -> Iterator[bytes]:
        """The bytes from `start` to `end`."""


class _Block(NamedTuple):
    """Bytes of an object from `start` to `end`, in the pieces in which they arrived: joining them would cost a copy."""

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
        raise EOFError(f"of the bytes {self.start} to {self.end} only those up to {start} arrived")


class ReadAheadFile(SeekableReader):
    """Reads in blocks, one ahead. Not for several threads at once. Raises FileNotFoundError, StoreError.

    All blocks are of the version that was opened. At most `_BLOCKS` + 1 of `LARGEST` bytes are in memory.
    """

    def __init__(self, ranges: ReadableAhead) -> None:
        super().__init__()
        self._ranges = ranges
        self._blocks: list[_Block] = []
        self._ahead: tuple[range, Future[_Block]] | None = None
        self._thread = ThreadPoolExecutor(1, "read-ahead")  # obstore's asyncio costs more CPU
        self.size, self._etag, pieces = ranges.first(FIRST)
        self._blocks = [self._fetch(ranges, 0, min(FIRST, self.size), pieces)]

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
        """Drop the blocks, and the one under way."""
        if not self.closed:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._blocks = []
        super().close()

    def _block_at(self, position: int) -> _Block:
        for block in reversed(self._blocks):
            if block.start <= position < block.end:
                return block
        if self._ahead and position in self._ahead[0]:
            (wanted, ahead), self._ahead = self._ahead, None
            try:
                block = ahead.result()
            except (OSError, UserError):  # repeated here alone, where somebody waits for it
                block = self._fetch(self._ranges, wanted.start, wanted.stop)
            in_order = True
        else:
            before = next((block for block in self._blocks if block.end == position), None)
            end = self._next_end(before) if before else min(position + FIRST, self.size)
            block = self._fetch(self._ranges, position, end)
            in_order = before is not None
        self._blocks = [*self._blocks[1 - _BLOCKS :], block]
        if in_order and block.end < self.size:
            if self._ahead:
                self._ahead[1].cancel()
            end = self._next_end(block)
            self._ahead = range(block.end, end), self._thread.submit(self._fetch, self._ranges.once(), block.end, end)
        return block

    def _next_end(self, before: _Block) -> int:
        return min(before.end + min((before.end - before.start) * _GROWTH, LARGEST), self.size)

    def _fetch(self, ranges: ReadableAhead, start: int, end: int, arrived: Iterable[bytes] = ()) -> _Block:
        """arrived: the first pieces, which an earlier request brought."""
        pieces = list(arrived)
        pieces += ranges.pieces(start + sum(map(len, pieces)), end, self._etag, _PIECE)
        return _Block(start, end, pieces)
