"""What runs in the decoder process: requests come in by standard input, frames go out by standard output.

In: the limits, then one request after another. Out, for each: chunks of frames as raw bytes and an end, or one message
that says what failed. The process opens what it reads itself: a large object does not pass through its parent.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from pipelines.decoder.limits import Limits, Stopwatch, Strain, confine, end_with_parent, outside
from pipelines.decoder.messages import BrokenMessageError, Content, receive, receive_request, send
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from storage.urls import open_listed, open_url
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import MediaKind, media_frames
from tokenization.media.video import count_samples
from tokenization.readers.webdataset_tar import Window

_MAX_REREADS = 8  # of a whole file; more is a reader in an endless loop
_MAX_REASON = 1000  # characters
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs in every run, and a reason must not
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "http", "urllib3"}  # their errors are failures of the store
_BY_DATA = (ValueError, ArithmeticError, LookupError, RuntimeError, EOFError)  # what readers raise on broken data


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    replies = os.dup(1)
    with contextlib.suppress(BrokenPipeError, BrokenMessageError):
        begin = receive(0)
        end_with_parent(begin["parent"])
        confine(limits := Limits(**begin["limits"]))
        # What libraries print about hostile data may be hostile too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        strain, stopwatch = Strain(limits), Stopwatch(limits.cpu_seconds)
        send(replies, {"is": "ready"})
        while True:
            request = receive_request(0)
            stopwatch.progress()
            for reply, *blocks in _replies(*request, stopwatch, strain):
                send(replies, reply, *blocks)


def _replies(
    content: Content, kind: MediaKind | None, wanted: FrameRequest | float, stopwatch: Stopwatch, strain: Strain
) -> Iterator[tuple[Any, ...]]:
    """The messages that answer a request: the fields of each, and its blocks."""
    try:
        with _opened(content) as opened:
            file = cast(BinaryIO, _Watched(opened, stopwatch))
            if not isinstance(wanted, FrameRequest):
                yield ({"is": "count", "count": count_samples(file, wanted)},)
                return
            for chunk in media_frames(file, kind, wanted):
                yield {"is": "frames", "count": len(chunk)}, chunk.times, chunk.frames
                stopwatch.progress()
        yield ({"is": "end"},)
    except Exception as error:
        yield (failure(error, strain),)


@contextlib.contextmanager
def _opened(content: Content) -> Iterator[BinaryIO]:
    if content.held is not None:
        yield io.BytesIO(content.held)
        return
    with outside():
        if content.etag is None:
            file = open_url(content.url, content.options)
        else:
            file = open_listed(content.url, content.etag, content.options)
    with file:
        yield file if content.window is None else io.BufferedReader(Window(file, *content.window), 1 << 16)


class _Watched:
    """A file whose reading is progress, until it has been read too often."""

    def __init__(self, file: BinaryIO, stopwatch: Stopwatch) -> None:
        self._file, self._stopwatch = file, stopwatch
        self.seek, self.tell = file.seek, file.tell
        self._left: float = math.inf
        with contextlib.suppress(OSError, ValueError):  # a stream without an end to seek to
            self._left = _MAX_REREADS * file.seek(0, io.SEEK_END)
            file.seek(0)

    def read(self, size: int = -1) -> bytes:
        with outside():
            content = self._file.read(size)
        self._left -= len(content)
        if content and self._left > 0:
            self._stopwatch.progress()
        return content


def failure(error: Exception, strain: Strain) -> dict[str, Any]:
    """The reply that makes the parent raise what this error means."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return {"is": "bad", "reason": None, "strained": True}
    if isinstance(error, BadData):
        return {"is": "bad", "reason": _reason(error), "strained": bool(strain)}
    if isinstance(error, StoreError):
        return {"is": "store_error", "message": str(error), "reason": error.reason, "kind": error.kind}
    if isinstance(error, UserError):
        return {"is": "user_error", "message": str(error)}
    if isinstance(error, OSError):
        kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        arguments = [value for value in (*error.args[:2], error.filename) if isinstance(value, str | int)]
        return {"is": "os_error", "kind": kind.__name__, "args": arguments or [str(error)]}
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return {"is": "os_error", "kind": "OSError", "args": [str(error) or type(error).__name__]}
    if isinstance(error, _BY_DATA):
        reason = f"it makes its decoder fail: {type(error).__name__}: {_reason(error)}"
        return {"is": "bad", "reason": reason, "strained": bool(strain)}
    return {"is": "failure", "traceback": "".join(traceback.format_exception(error))[-100_000:]}


def _reason(error: Exception) -> str:
    return _ADDRESS.sub("", str(error))[:_MAX_REASON]


if __name__ == "__main__":
    main()
