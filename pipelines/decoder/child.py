"""What runs in every decoder process: requests come in by standard input, a socket; answers go out by standard output.

In: the limits, then one request after another. Out, for each: messages with blocks, and an end, or one message that
says what failed. A child of media (`media_child`) or of tables (`table_child`) gives the function that answers.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import math
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from pipelines.decoder.content import received
from pipelines.decoder.limits import Limits, Stopwatch, Strain, confine, end_with_parent
from pipelines.decoder.messages import BrokenMessageError, receive, send
from pipelines.decoder.sandbox import confine_calls
from storage.errors import BadData

_MAX_REASON = 1000  # characters
_MAX_REQUEST_BYTES = 1 << 30
_GC_THRESHOLD = 50_000
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs in every run, and a reason must not
# What readers raise on broken data.
_BY_DATA = (ValueError, ArithmeticError, LookupError, RuntimeError, EOFError, OSError, TypeError)

Answer = tuple[dict[str, Any], *tuple[Any, ...]]
"""The fields of a message, and its blocks."""


def serve(answers: Callable[[dict[str, Any], BinaryIO], Iterator[Answer]]) -> None:
    """Serve requests until the parent closes the socket. answers: those to a request about a file."""
    replies = os.dup(1)
    with contextlib.suppress(BrokenPipeError, BrokenMessageError), socket.socket(fileno=os.dup(0)) as connection:
        requests = connection.fileno()
        begin = receive(requests)
        end_with_parent(begin["parent"])
        confine(limits := Limits(**begin["limits"]))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        is_confined = confine_calls()
        # What libraries print about hostile data may be hostile too.
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        gc.freeze()  # what is imported stays; and records, which hold no cycles, are let go without being looked at
        gc.set_threshold(_GC_THRESHOLD)
        strain, stopwatch = Strain(limits), Stopwatch(limits.cpu_seconds)
        send(replies, {"is": "ready", "is_confined": is_confined})
        while True:
            request = receive(requests, _MAX_REQUEST_BYTES)
            stopwatch.begin()
            try:
                with received(connection, replies, request["content"]) as file:
                    for reply, *blocks in answers(request, cast(BinaryIO, _Watched(file, stopwatch))):
                        send(replies, reply, *blocks)
                        stopwatch.has_delivered(reply.get("count", 1))
                last = {"is": "end"}
            except (BrokenPipeError, BrokenMessageError):
                raise
            except Exception as error:
                last = failure(error, strain)
            send(replies, last)


class _Watched:
    """A file of which as much as it has, read for the first time or again, counts as having been read."""

    def __init__(self, file: BinaryIO, stopwatch: Stopwatch) -> None:
        self._file, self._stopwatch = file, stopwatch
        self.seek, self.tell, self.closed = file.seek, file.tell, False
        self._left: float = math.inf
        with contextlib.suppress(OSError, ValueError):  # a stream without an end to seek to
            self._left = file.seek(0, io.SEEK_END)
            file.seek(0)

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._stopwatch.has_read(int(min(len(content), self._left)))
        self._left -= min(len(content), self._left)
        return content


def failure(error: Exception, strain: Strain) -> dict[str, Any]:
    """The reply that makes the parent raise what this error means."""
    is_of_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if is_of_memory or isinstance(error.__cause__, MemoryError):
        return {"is": "bad", "reason": None, "strained": True}
    if isinstance(error, BadData):
        return {"is": "bad", "reason": _reason(error), "strained": bool(strain)}
    if isinstance(error, _BY_DATA):
        reason = f"it makes its decoder fail: {type(error).__name__}: {_reason(error)}"
        return {"is": "bad", "reason": reason, "strained": bool(strain)}
    return {"is": "failure", "traceback": "".join(traceback.format_exception(error))[-100_000:]}


def _reason(error: Exception) -> str:
    return _ADDRESS.sub("", str(error))[:_MAX_REASON]
