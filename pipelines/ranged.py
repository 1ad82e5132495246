"""A remote object as a seekable file: each read is one ranged request for exactly those bytes, retried and resumed.

In: a URL and fsspec options. Out: a binary file for reading at offsets that are known. A general file of fsspec reads
ahead, up to 50 MiB a request, which pays for streams and costs 200 times the bytes for single sequences of a shard.

A request that fails (the store answers 5xx or 429, the connection breaks or is refused) is repeated after a pause that
doubles, and goes on at the byte where the last one stopped; a request that brought bytes starts the count anew. What
repeating does not mend (no permission, no such object) is raised at once.
"""

from __future__ import annotations

import io
import logging
import time
from typing import Any

from fsspec.asyn import sync

from pipelines.urls import filesystem
from tokenization.errors import UserError

log = logging.getLogger("ringworld")

ATTEMPTS = 5
PAUSE_SECONDS = 0.5
_PIECE = 1 << 18
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "http", "urllib3"}


class RangedFile(io.RawIOBase):
    """Reads an object by ranges. Not for several threads at once.

    attempts: requests in a row that may bring nothing before the read fails. pause: seconds before the first repeat.
    Reading raises FileNotFoundError where there is no such object, else UserError naming object and store.
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
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always; seeking asks the store nothing, unless it is from the end."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; beyond the end there is nothing to read."""
        origin = (0, self._position, 0)[whence] if whence != io.SEEK_END else int(self._fs.size(self._path))
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here; fewer bytes only where the object ends."""
        view = memoryview(buffer).cast("B")
        got = failures = 0
        while got < len(view):
            more, error = self._request(self._position + got, view[got:])
            got += more
            if error is None:
                break
            failures = 0 if more else failures + 1
            if failures >= self.attempts:
                raise self._unusable(f"in {failures} attempts", error)
            log.info("%s: reading goes on at byte %d after: %s", self.url, self._position + got, _said(error))
            time.sleep(self.pause * 2 ** max(0, failures - 1))
        self._position += got
        return got

    def _request(self, start: int, view: memoryview) -> tuple[int, Exception | None]:
        """Bytes got, and what cut them short: None where they are all, or all up to the object's end."""
        got: int
        error: Exception | None
        try:
            if hasattr(self._fs, "get_s3"):
                got, error = sync(self._fs.loop, _stream_s3, self._fs, self._path, start, view)
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
        if not _passes(error):
            if _status(error) is None and not isinstance(error, OSError):
                raise error
            raise self._unusable("", error)
        return got, error

    def _unusable(self, tried: str, error: Exception) -> UserError:
        endpoint = getattr(self._fs, "endpoint_url", None) or (getattr(self._fs, "client_kwargs", None) or {}).get(
            "endpoint_url"
        )
        return UserError(
            f"{self.url}: cannot be read{f' {tried}' if tried else ''} from the store"
            f"{f' at {endpoint}' if endpoint else ''} ({_said(error)}); check that it is up and the credentials, "
            f"and run again to carry on"
        )


async def _stream_s3(fs: Any, path: str, start: int, view: memoryview) -> tuple[int, Exception | None]:
    """One GET of S3 as it arrives, so that what came before a cut is kept."""
    got = 0
    try:
        bucket, key, _ = fs.split_path(path)
        await fs.set_session()
        client = await fs.get_s3(bucket)
        asked = f"bytes={start}-{start + len(view) - 1}"
        response = await client.get_object(Bucket=bucket, Key=key, Range=asked, **fs.req_kw)
        async with response["Body"] as body:
            while piece := await body.read(min(_PIECE, len(view) - got)):
                view[got : got + len(piece)] = piece
                got += len(piece)
    except Exception as error:  # told to the caller beside what was got
        return got, error
    return got, None


def _status(error: Exception) -> int | None:
    """The HTTP status that a client's error stands for, where it stands for one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
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
