"""One decoder process, started, asked, and ended; it answers any number of requests, one at a time.

In: requests. Out: what child.py sends, as frames or as the exception that it stands for. A process that has died raises
`DecoderDiedError` and is of no more use.
"""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from pipelines.decoder import child
from pipelines.decoder.limits import Limits
from pipelines.decoder.messages import BrokenMessageError, receive, receive_block, request_message, send
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import FrameChunk

_STRAY = 5  # seconds that a process that has closed its pipe may take to end

# What the kernel and the C library do to a process for what its data made it do. Any other signal is somebody's.
_OF_THE_DATA = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGXCPU,
}


class DecoderDiedError(Exception):
    """The process ended before its answer did. by_data: whether that says something about the data."""

    def __init__(self, code: int | None) -> None:
        self.signal = signal.Signals(-code) if code is not None and code < 0 else None
        self.by_data = self.signal is None or self.signal in _OF_THE_DATA
        super().__init__(self.signal.name if self.signal else f"exit code {code}")


class StrainedError(Exception):
    """The medium is bad, or memory was short: the process was near its limit. reason: None where it says the latter."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        super().__init__(reason)


class DecoderProcess:
    """A running decoder. fresh: whether it has not been asked anything yet. idle: whether it waits for a request; one
    whose frames have not all been taken does not.
    """

    def __init__(self, limits: Limits) -> None:
        """Start it. Raises OSError where that is impossible now, RuntimeError where it always is."""
        self.limits, self.fresh, self.idle = limits, True, False
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", child.__name__],  # -P: not what the working directory may hold
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **threads, "PYTHONPATH": paths},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            self._send({"parent": os.getpid(), "limits": asdict(limits)})
            self._receive()
        except DecoderDiedError as death:
            if death.by_data:  # there was no data yet
                raise RuntimeError(f"the decoder process does not start: {death}") from None
            raise

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def frames(self, fields: dict[str, Any], request: FrameRequest, *blocks: Any) -> Iterator[FrameChunk]:
        """Frames as `media_frames` makes them. Raises what it raises, `StrainedError` and `DecoderDiedError`."""
        wanted, numbers = request_message(request)
        self._ask({"do": "frames", **fields, "request": wanted}, *blocks, *numbers)
        size = request.size
        while (reply := self._receive())["is"] == "frames":
            count = reply.get("count")
            if not isinstance(count, int) or not 0 < count <= request.chunk:
                raise self._death()
            times, frames = np.empty(count), np.empty((count, size, size, 3), dtype=np.uint8)
            self._fill(times)
            self._fill(frames)
            yield FrameChunk(frames, times)

    def count(self, fields: dict[str, Any], *blocks: Any) -> int:
        """Samples of a video as `count_samples` counts them; raises as `frames` does."""
        self._ask({"do": "count", **fields}, *blocks)
        return int(self._receive()["count"])

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.idle = False
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.wait()

    def _ask(self, fields: dict[str, Any], *blocks: Any) -> None:
        self.fresh = self.idle = False
        self._send(fields, *blocks)

    def _send(self, fields: dict[str, Any], *blocks: Any) -> None:
        try:
            send(self._to, fields, *blocks)
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        try:
            reply = receive(self._from)
            error = None if reply is None else _error(reply)
        except (BrokenMessageError, KeyError, TypeError):
            reply = None
        if reply is None:
            raise self._death() from None
        self.idle = reply["is"] != "frames"
        if error is not None:
            raise error
        return reply

    def _fill(self, array: np.ndarray) -> None:
        try:
            receive_block(self._from, array)
        except BrokenMessageError:
            raise self._death() from None

    def _death(self) -> DecoderDiedError:
        """How it ended; one that talks nonsense is ended here."""
        try:
            code: int | None = self._process.wait(_STRAY)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        return DecoderDiedError(code)


def _error(reply: dict[str, Any]) -> Exception | None:
    """What a reply that is no answer stands for. Raises KeyError or TypeError on one that child.py does not send."""
    match reply["is"]:
        case "bad" if reply["strained"]:
            return StrainedError(reply["reason"])
        case "bad":
            return BadData(reply["reason"])
        case "store_error":
            return StoreError(reply["message"], reply["reason"], reply["kind"])
        case "user_error":
            return UserError(reply["said"])
        case "os_error":
            kind = getattr(builtins, reply["kind"])
            return kind(*reply["args"]) if issubclass(kind, OSError) else None
        case "failure":
            return RuntimeError(f"in the decoder process: {reply['said']}")
    return None
