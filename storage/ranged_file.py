"""A remote object as a seekable file: each read is one ranged request for exactly those bytes, retried and resumed.

In: a URL and fsspec options. Out: a binary file for reading at offsets that are known. A general file reads ahead,
which pays for streams and costs many times the bytes for single sequences of a shard.

A request that fails (the store answers 5xx or 429, the connection breaks or is refused) is repeated after a pause that
doubles, and goes on at the byte where the last one stopped; a request that brought bytes starts the count anew. What
repeating does not mend (no permission, no such object) is raised at once.
"""

from __future__ import annotations

from typing import Any

from storage.object_store.client import PAUSE_SECONDS, pause
from storage.object_store.errors import Request, StoreError
from storage.object_store.filesystem import BucketFileSystem
from storage.seekable import SeekableReader
from storage.urls import filesystem

ATTEMPTS = 5
_CLIENTS = {"aiohttp", "http", "urllib3"}


class RangedFile(SeekableReader):
    """Reads an object by ranges. Not for several threads at once.

    attempts: requests in a row that may bring nothing before the read fails. pause: seconds before the first repeat.
    Reading raises FileNotFoundError where there is no such object, else StoreError naming object and store.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, Any] | None = None,
        *,
        attempts: int = ATTEMPTS,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        super().__init__()
        self.url, self.attempts, self.pause = url, attempts, pause
        self._fs, self._path = filesystem(url, options)

    def _end(self) -> int:
        return int(self._fs.size(self._path))

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here; fewer bytes only where the object ends."""
        view = memoryview(buffer).cast("B")
        got = failures = 0
        asked = self._asked()
        while got < len(view):
            more, error = self._request(asked, self._position + got, view[got:])
            got += more
            if error is None:
                break
            failures = 0 if more else failures + 1
            if failures >= self.attempts:
                raise asked.failure(error.reason, error.kind, failures)
            attempt = max(1, failures)
            if isinstance(self._fs, BucketFileSystem):
                self._fs.client(self._path)[0].wait(asked, error, attempt, self.pause)
            else:
                pause(asked, error, attempt, self.pause)
        self._position += got
        return got

    def _asked(self) -> Request:
        if isinstance(self._fs, BucketFileSystem):
            return self._fs.client(self._path)[0].asked(self.url, "read")
        return Request(self.url, "read")

    def _request(self, asked: Request, start: int, view: memoryview) -> tuple[int, StoreError | None]:
        """Bytes got, and what cut them short: None where they are all, or all up to the object's end."""
        got: int
        error: Exception | None
        try:
            if isinstance(self._fs, BucketFileSystem):
                got, error = self._fs.read_into(self._path, start, view)
            else:
                body = self._fs.cat_file(self._path, start, start + len(view))
                view[: len(body)] = body
                got, error = len(body), None
        except Exception as raised:  # client libraries raise what they like
            got, error = 0, raised
        if error is None or _status(error) == 416:  # the range begins at or after the end
            return got, None
        if isinstance(error, FileNotFoundError) or _status(error) == 404:
            raise FileNotFoundError(self.url)
        if isinstance(error, StoreError):
            if not self._fs.client(self._path)[0].passes(error.kind):
                raise error
            return got, error
        if not _passes(error):
            if _status(error) is None and not isinstance(error, OSError):
                raise error
            raise asked.failure(_said(error), "refused")
        return got, asked.failure(_said(error), "transient")


def _status(error: Exception) -> int | None:
    """The HTTP status that a client's error stands for, where it stands for one."""
    status = getattr(error, "status", None)  # aiohttp's
    return status if isinstance(status, int) else None


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    status = _status(error)
    if status:
        return status >= 500 or status == 429
    if isinstance(error, PermissionError):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
