"""Objects on web servers, of which nothing is believed and nothing read without a bound.

In: a URL, and who names it: a recipe, or a record within its `Reach`. Out: size and ETag, and a seekable file that
reads ahead by ranges, or, where a server has no ranges, over a copy on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import aiohttp
from fsspec.asyn import get_loop, sync
from fsspec.implementations.http import HTTPFileSystem

from storage.errors import BadData
from storage.public_url import public_url
from storage.reach import Reach
from storage.remote_file import FIRST, ReadAheadFile
from storage.retry import Backoff, retry
from storage.web_client import Route, client_of
from storage.web_errors import WebFailure, failure_of, failure_of_status


@dataclass(frozen=True)
class WebLimits:
    """What one object may cost. size: bytes, where its server says how many there are. unsaid_size: where it does not.
    seconds, slowest: requests may take so many seconds, and one more for each `slowest` bytes that came.
    """

    size: float
    unsaid_size: float
    seconds: float | None
    slowest: int = 2**16


OF_RECIPES = WebLimits(float("inf"), 2**36, None)
"""For what a recipe names. What comes without a size goes to disk."""
OF_RECORDS = WebLimits(2**32, 2**28, 60.0)
"""For what a record names."""
AGAIN = Backoff(attempts=4, pause=0.5)
"""For requests that fail for a while."""

_LONGEST_PAUSE = 30.0  # seconds for which a server may ask to be left alone; one that asks for more is away


@dataclass(frozen=True)
class _Answer:
    """size: of the object in bytes, None where the server does not say. is_range: whether the server gives ranges: then
    `pieces` are the bytes asked for, all of them if `is_complete`; where not, the file that was to take them has all.
    """

    size: int | None
    etag: str | None
    is_range: bool
    pieces: tuple[bytes, ...] = ()
    is_complete: bool = True


@dataclass
class _Used:
    """What requests for an object have taken so far: seconds, and bytes of it that came."""

    seconds: float = 0.0
    size: int = 0


class WebObject:
    """One object on a web server. What cannot be read raises, where a recipe names it, FileNotFoundError or StoreError;
    so it does for a record, where the object is on the host of the record's file, and that is away or denies it. Any
    other object that a record names raises BadData.
    """

    def __init__(self, url: str, reach: Reach | None = None, backoff: Backoff | None = None) -> None:
        self._route = Route(url, reach)
        self._limits = OF_RECIPES if reach is None else OF_RECORDS
        self._used, self._backoff, self._is_ahead = _Used(), backoff or AGAIN, False
        self._opened: _Answer | None = None

    def info(self) -> tuple[int | None, str | None]:
        """Size in bytes and ETag, each None where the server does not say."""
        answer = self._ask(lambda: self._get(0, 1))
        return answer.size, answer.etag

    def open(self) -> BinaryIO:
        """A seekable file over its bytes."""
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - it is what is returned
        try:
            answer = self._ask(lambda: self._get(0, FIRST, spool=spool))
        except BaseException:
            spool.close()
            raise
        self._route.served()
        if not answer.is_range:
            spool.flush()  # who reads it by its descriptor finds all of it
            spool.seek(0)
            return spool
        spool.close()
        self._opened = answer
        return io.BufferedReader(ReadAheadFile(self), 2**16)

    def once(self) -> WebObject:
        """The same by requests that are not repeated, whose failures are StoreErrors."""
        ahead = WebObject(self._route.url, self._route.reach)
        ahead._used, ahead._backoff, ahead._is_ahead = self._used, replace(self._backoff, attempts=1), True
        return ahead

    def first(self, n_bytes: int) -> tuple[int, str | None, list[bytes]]:
        """Size and ETag, and its first bytes, of an object that was opened and has ranges."""
        assert self._opened is not None
        assert self._opened.size is not None
        return self._opened.size, self._opened.etag, list(self._opened.pieces)

    def pieces(self, start: int, end: int, etag: str | None = None, piece_bytes: int = 1) -> Iterator[bytes]:
        """The bytes from `start` to `end`, by requests that go on where one was cut."""
        while start < end:
            answer = self._ask(lambda: self._get(start, end, etag))  # noqa: B023 - called before either changes
            if not answer.is_range:
                raise self._error(WebFailure("refused", "its server gives no ranges of it"))
            yield from answer.pieces
            start += sum(map(len, answer.pieces))
            if answer.is_complete:
                return

    def _ask(self, request: Callable[[], Any]) -> _Answer:
        """The answer to a request, repeated while its failures are transient and the object has time left."""
        attempts = 0

        def attempt() -> _Answer:
            nonlocal attempts
            attempts += 1
            try:
                return sync(get_loop(), request)
            except BadData:
                raise
            except Exception as error:
                if failure := failure_of(error):
                    raise failure from error
                raise

        try:
            return retry(
                attempt,
                f"{public_url(self._route.url)}: cannot be read just now",
                self._backoff,
                is_transient=lambda error: isinstance(error, WebFailure) and self._may_repeat(error),
                topic=self._route.host,
                warn=self._route.reach is None,
                pause_of=lambda error: error.pause if isinstance(error, WebFailure) else 0.0,
            )
        except WebFailure as failure:
            raise self._error(failure, attempts) from None

    def _may_repeat(self, failure: WebFailure) -> bool:
        left = self._left()
        return failure.transient and failure.pause <= _LONGEST_PAUSE and (left is None or left > 0)

    def _left(self) -> float | None:
        """Seconds that requests for the object may still take."""
        if self._limits.seconds is None:
            return None
        return max(0.0, self._limits.seconds + self._used.size / self._limits.slowest - self._used.seconds)

    def _error(self, failure: WebFailure, attempts: int = 1) -> Exception:
        """What who asked is to get for it."""
        route, shown = self._route, public_url(self._route.url)
        is_stores = failure.cause != "refused" and route.is_own
        if route.reach is None or self._is_ahead or is_stores:
            return failure.as_error(route.url, attempts)
        if not failure.transient:
            return BadData(f"{shown}: {failure.reason}")
        route.failed(failure.reason)
        return BadData(f"{shown}: its host {route.host} does not serve it now: {failure.reason}")

    async def _get(self, start: int, end: int, etag: str | None = None, spool: BinaryIO | None = None) -> _Answer:
        """What one request for a range brings. spool: takes the whole body where the server gives no ranges."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = self._left()
        try:
            async with asyncio.timeout(left) as limit:
                return await self._answer(start, end, etag, spool, limit)
        finally:
            self._used.seconds += loop.time() - began

    async def _answer(
        self, start: int, end: int, etag: str | None, spool: BinaryIO | None, limit: asyncio.Timeout
    ) -> _Answer:
        headers = {
            "Range": f"bytes={start}-{end - 1}",
            **({"If-Match": etag} if etag and not etag.startswith("W/") else {}),
        }
        async with self._route.answer(headers) as response:
            if response.status == 416 and not start:  # there is no first byte, or the server takes no such header
                response.close()
                async with self._route.answer({}) as whole:
                    return await self._whole(whole, spool, limit)
            if response.status != 206:
                return await self._whole(response, spool, limit)
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
            if not span or int(span[1]) != start:
                raise WebFailure("refused", "its server answers other bytes than those asked for")
            size = self._bounded(int(span[3]))
            end = min(end, size)
            pieces, arrived = [], start
            with contextlib.suppress(aiohttp.ClientPayloadError, aiohttp.ClientConnectionError):
                async for piece in self._body(response, limit):
                    pieces.append(piece[: end - arrived])
                    arrived += len(pieces[-1])
                    if arrived == end:
                        break
            if not arrived > start:
                raise WebFailure("transient", "the connection was cut")
            return _Answer(size, _etag(response), True, tuple(pieces), arrived == end)

    async def _whole(self, response: aiohttp.ClientResponse, spool: BinaryIO | None, limit: asyncio.Timeout) -> _Answer:
        """The answer of a server that gives no ranges."""
        if response.status not in (200, 203):
            raise failure_of_status(response.status, response.headers.get("Retry-After"))
        size = None if response.content_length is None else self._bounded(response.content_length)
        if spool is None:
            response.close()  # without its body
            return _Answer(size, _etag(response), False)
        spool.seek(0)
        spool.truncate()
        async for piece in self._body(response, limit):
            spool.write(piece)
            if size is None and spool.tell() > self._limits.unsaid_size:
                raise _too_large("says no size and goes on after", self._limits.unsaid_size)
        return _Answer(size, _etag(response), False)

    async def _body(self, response: aiohttp.ClientResponse, limit: asyncio.Timeout) -> AsyncIterator[bytes]:
        """The body as it is, in pieces; each one earns the object some time."""
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):  # it says nothing of how much comes out
            raise WebFailure("refused", f"its server compresses it ({encoding[:20]}), which it was asked not to do")
        async for piece in response.content.iter_any():
            self._used.size += len(piece)
            if (when := limit.when()) is not None:
                limit.reschedule(when + len(piece) / self._limits.slowest)
            yield piece

    def _bounded(self, size: int) -> int:
        if size > self._limits.size:
            raise _too_large(f"has {size} bytes, over", self._limits.size)
        return size


class WebRanges:
    """The bytes of an object that a recipe names, of one version, for a `RangedFile`. Raises as `WebObject` does."""

    def __init__(self, url: str, backoff: Backoff) -> None:
        self._object = WebObject(url, backoff=backoff)

    def size(self) -> int:
        """In bytes; 0 where the server says none, which gives no ranges either."""
        return self._info[0] or 0

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Those from `start` to `end`, fewer only at the end of the object."""
        size, etag = self._info
        return self._object.pieces(start, end if size is None else min(end, size), etag)

    @functools.cached_property
    def _info(self) -> tuple[int | None, str | None]:
        return self._object.info()


class WebFileSystem(HTTPFileSystem):
    """fsspec's, whose objects are `WebObject`s. reach: of the records that name what is read; None: a recipe does."""

    def __init__(self, reach: Reach | None = None, **options: Any) -> None:
        self._reach = reach
        client = client_of(is_recipes=reach is None, only_public=reach is not None, auto_decompress=True)
        super().__init__(get_client=client, **options)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Size, None where the server does not say, and ETag, where it does. Raises as `WebObject` does."""
        size, etag = WebObject(path, self._reach).info()
        return {"name": path, "size": size, "type": "file", **({"ETag": etag} if etag else {})}

    def get_file(self, rpath: str, lpath: Any, **kwargs: Any) -> None:
        """Copy an object to a local path. Raises as `WebObject` does."""
        with self.open(rpath) as file, open(lpath, "wb") as copy:
            shutil.copyfileobj(file, copy, 2**20)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode != "rb":
            raise io.UnsupportedOperation("the web is only read")
        return WebObject(path, self._reach).open()


def _etag(response: aiohttp.ClientResponse) -> str | None:
    return response.headers.get("ETag") or None


def _too_large(what: str, limit: float) -> WebFailure:
    return WebFailure("refused", f"it {what} the {limit / 2**30:g} GiB that one medium may have")
