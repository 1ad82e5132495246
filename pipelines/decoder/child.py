"""What runs in the decoder process: requests come in by standard input, frames go out by standard output.

In: first the limits, then one request after another: which bytes to read, and what to make of them. Out, for each:
chunks of frames as raw bytes and an end, or one message of what stood in the way. The process opens what it reads by
itself, so that a large object passes through nobody else.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pipelines.decoder.limits import Limits, Stopwatch, Strain, confine, end_with_parent, outside
from pipelines.decoder.messages import receive, receive_block, receive_request, send
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from storage.urls import open_url
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames
from tokenization.media.video import count_samples
from tokenization.readers.webdataset_tar import Window

_REREADS = 8  # of a whole file; more is a reader that goes in circles
_LONGEST_REASON = 1000
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another every time, where a reason must be the same
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "http", "urllib3"}  # what these raise is the store's
_HOSTILE = (ValueError, ArithmeticError, LookupError, RuntimeError, EOFError)  # what broken data makes a reader raise


def main() -> None:
    """Serve requests until there are no more."""
    replies = os.dup(1)
    begin = receive(0)
    if begin is None:
        return
    end_with_parent(begin["parent"])
    confine(limits := Limits(**begin["limits"]))
    # What libraries have to say of hostile data is hostile data.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    strain, stopwatch = Strain(limits), Stopwatch(limits.cpu_seconds)
    with contextlib.suppress(BrokenPipeError):
        send(replies, {"is": "ready"})
        while (request := _next_request()) is not None:
            stopwatch.progress()
            _answer(request, replies, stopwatch, strain)


@dataclass(frozen=True)
class _Request:
    """fields: which bytes to read and what to make of them, as the client sends them. held: the bytes of the file,
    where they come with it. frames: which frames to make, None where they are only counted.
    """

    fields: dict[str, Any]
    held: bytearray | None
    frames: FrameRequest | None


def _next_request() -> _Request | None:
    fields = receive(0)
    if fields is None:
        return None
    held = None
    if fields["held"] is not None:
        receive_block(0, held := bytearray(fields["held"]))
    frames = receive_request(0, fields["request"]) if fields["do"] == "frames" else None
    return _Request(fields, held, frames)


def _answer(request: _Request, replies: int, stopwatch: Stopwatch, strain: Strain) -> None:
    fields = request.fields
    try:
        with _opened(request) as opened:
            file = cast(BinaryIO, _Watched(opened, stopwatch))
            if request.frames is None:
                send(replies, {"is": "count", "count": count_samples(file, fields["fps"])})
                return
            for chunk in media_frames(file, fields["kind"], request.frames):
                send(replies, {"is": "frames", "count": len(chunk)}, chunk.times, chunk.frames)
                stopwatch.progress()
        reply: dict[str, Any] = {"is": "end"}
    except BrokenPipeError:
        raise
    except Exception as error:
        reply = _told(error, strain)
    send(replies, reply)


@contextlib.contextmanager
def _opened(request: _Request) -> Iterator[BinaryIO]:
    if request.held is not None:
        yield io.BytesIO(request.held)
        return
    with outside():
        file = open_url(request.fields["url"], request.fields["options"])
    with file:
        window = request.fields["window"]
        yield file if window is None else io.BufferedReader(Window(file, *window), 1 << 16)


class _Watched:
    """A file whose reading is progress, as long as it does not go in circles."""

    def __init__(self, file: BinaryIO, stopwatch: Stopwatch) -> None:
        self._file, self._stopwatch = file, stopwatch
        self.seek, self.tell = file.seek, file.tell
        self._left: float = math.inf
        with contextlib.suppress(OSError, ValueError):  # a stream without an end to seek to
            self._left = _REREADS * file.seek(0, io.SEEK_END)
            file.seek(0)

    def read(self, size: int = -1) -> bytes:
        with outside():
            content = self._file.read(size)
        self._left -= len(content)
        if content and self._left > 0:
            self._stopwatch.progress()
        return content


def _told(error: Exception, strain: Strain) -> dict[str, Any]:
    """What the parent is to raise."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return {"is": "bad", "reason": None, "strained": True}
    if isinstance(error, BadData):
        return {"is": "bad", "reason": _reason(error), "strained": bool(strain)}
    if isinstance(error, StoreError):
        return {"is": "store_error", "message": str(error), "reason": error.reason, "kind": error.kind}
    if isinstance(error, UserError):
        return {"is": "user_error", "said": str(error)}
    if isinstance(error, OSError):
        kind = next(one for one in type(error).__mro__ if one.__module__ == "builtins")
        said = [one for one in (*error.args[:2], error.filename) if isinstance(one, str | int)]
        return {"is": "os_error", "kind": kind.__name__, "args": said or [str(error)]}
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return {"is": "os_error", "kind": "OSError", "args": [str(error) or type(error).__name__]}
    if isinstance(error, _HOSTILE):
        reason = f"it makes its decoder fail: {type(error).__name__}: {_reason(error)}"
        return {"is": "bad", "reason": reason, "strained": bool(strain)}
    return {"is": "failure", "said": "".join(traceback.format_exception(error))[-100_000:]}


def _reason(error: Exception) -> str:
    return _ADDRESS.sub("", str(error))[:_LONGEST_REASON]


if __name__ == "__main__":
    main()
    sys.exit()
