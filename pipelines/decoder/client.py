"""The door to decoder processes. In: where a medium's bytes are. Out: its frames, even if a process dies.

A process answers one request at a time and is kept for the thread's next medium. One that dies in a way that the data
may have caused (a crash, too much processor time) is replaced once, and then the medium is `BadData`; so is a lack of
memory, found in a process that no other medium has used. A process that was killed from outside says nothing about the
data: it is replaced a few times, and then an OSError is raised, which the caller may retry. No chunk is yielded twice.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

from pipelines.decoder import child
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.decoder.messages import BrokenMessageError, Content, receive, receive_block, send, send_request
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import MediaKind
from tokenization.media.video import FrameChunk

_KILLS = 4  # of processes in a row, without an answer between them
_EXIT_SECONDS = 5  # that a process that has closed its pipe may take to end

# Signals that the kernel and the C library send for what the data made a process do. Any other was sent by someone.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_BY_DATA = _CRASHES | {signal.SIGXCPU}

Answer = TypeVar("Answer")


def decoded_frames(
    content: Content, kind: MediaKind | None, request: FrameRequest, limits: Limits = DEFAULT_LIMITS
) -> Iterator[FrameChunk]:
    """Frames as `tokenization.media.frames.media_frames` makes them.

    Raises BadData on what cannot be decoded within the limits; OSError and UserError of opening and reading the content
    as they are; OSError when the process is killed again and again.
    """
    return _answers(lambda decoder: decoder.frames(content, kind, request), limits)


def counted_samples(content: Content, fps: float, limits: Limits = DEFAULT_LIMITS) -> int:
    """Samples of a whole video, by `tokenization.media.video.count_samples`. Raises as `decoded_frames` does."""
    (count,) = _answers(lambda decoder: iter([decoder.count(content, fps)]), limits)
    return count


def _answers(ask: Callable[[DecoderProcess], Iterator[Answer]], limits: Limits) -> Iterator[Answer]:
    """What a process answers, each answer once, over as many processes as it takes."""
    yielded = kills = 0
    fresh = has_crashed = False
    while True:
        try:
            with _decoder(limits, fresh) as decoder:
                fresh = decoder.fresh
                for number, answer in enumerate(ask(decoder)):
                    if number >= yielded:
                        yielded, kills = yielded + 1, 0
                        yield answer
            return
        except StrainedError as strained:
            if fresh:
                allowed = f"more memory than tokenize.decoder_memory_gib allows ({limits.memory / 2**30:g})"
                reason = f"{strained.reason}; it may take" if strained.reason else "decoding it takes"
                raise BadData(f"{reason} {allowed}") from None
            fresh = True
        except DecoderDiedError as death:
            if not death.by_data:
                kills += 1
                if kills == _KILLS:
                    raise OSError(f"the decoder process was killed {kills} times ({death})") from None
                continue
            if has_crashed and death.signal == signal.SIGXCPU:
                allowed = f"tokenize.decoder_cpu_seconds allows ({limits.cpu_seconds})"
                raise BadData(f"decoding it stands still for more processor time than {allowed}") from None
            if has_crashed:
                raise BadData(f"decoding it makes the decoder crash ({death})") from None
            fresh = has_crashed = True


_kept = threading.local()  # .decoder: the process of this thread, which the kernel ends with the thread
os.register_at_fork(after_in_child=lambda: vars(_kept).clear())  # the pipes are the parent's


@contextlib.contextmanager
def _decoder(limits: Limits, fresh: bool) -> Iterator[DecoderProcess]:
    """The process that this thread keeps, or a new one: always where it is to be `fresh`."""
    decoder: DecoderProcess | None = vars(_kept).pop("decoder", None)
    if decoder is not None and (fresh or not decoder.alive or decoder.limits != limits):
        decoder.close()
        decoder = None
    decoder = decoder or DecoderProcess(limits)
    try:
        yield decoder
    except StrainedError:
        decoder.close()
        raise
    finally:
        if decoder.idle and decoder.alive and "decoder" not in vars(_kept):
            _kept.decoder = decoder
        else:
            decoder.close()


@atexit.register
def close_idle() -> None:
    """End the process that this thread keeps."""
    if decoder := vars(_kept).pop("decoder", None):
        decoder.close()


class DecoderDiedError(Exception):
    """The process ended before its answer did. by_data: whether that says something about the data."""

    def __init__(self, code: int | None) -> None:
        self.signal = signal.Signals(-code) if code is not None and code < 0 else None
        self.by_data = self.signal is None or self.signal in _BY_DATA
        super().__init__(self.signal.name if self.signal else f"exit code {code}")


class StrainedError(Exception):
    """The medium is bad, or memory was short: the process was near its limit. reason: None where it is memory."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        super().__init__(reason)


class DecoderProcess:
    """A running decoder. fresh: it has had no request. idle: it waits for one, and all its frames have been taken."""

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
            with self._death_raised():
                send(self._to, {"parent": os.getpid(), "limits": asdict(limits)})
            self._receive()
        except DecoderDiedError as death:
            if death.by_data:  # there was no data yet
                raise RuntimeError(f"the decoder process does not start: {death}") from None
            raise

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def frames(self, content: Content, kind: MediaKind | None, request: FrameRequest) -> Iterator[FrameChunk]:
        """Frames as `media_frames` makes them. Raises what it raises, `StrainedError` and `DecoderDiedError`."""
        self._ask(content, kind, request)
        size = request.size
        while (reply := self._receive())["is"] == "frames":
            count = reply.get("count")
            if not isinstance(count, int) or not 0 < count <= request.chunk:
                raise self._death()
            times, frames = np.empty(count), np.empty((count, size, size, 3), dtype=np.uint8)
            with self._death_raised():
                receive_block(self._from, times)
                receive_block(self._from, frames)
            yield FrameChunk(frames, times)

    def count(self, content: Content, fps: float) -> int:
        """Samples of a video as `count_samples` counts them; raises as `frames` does."""
        self._ask(content, "video", fps)
        return int(self._receive()["count"])

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.idle = False
        self._process.kill()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            pipe.close()
        self._process.wait()

    def _ask(self, content: Content, kind: MediaKind | None, wanted: FrameRequest | float) -> None:
        self.fresh = self.idle = False
        with self._death_raised():
            send_request(self._to, content, kind, wanted)

    def _receive(self) -> dict[str, Any]:
        with self._death_raised():
            reply = receive(self._from)
            try:
                error = _error(reply)
            except (AttributeError, KeyError, TypeError):
                raise BrokenMessageError("not a reply of child.py") from None
        self.idle = reply["is"] != "frames"
        if error is not None:
            raise error
        return reply

    @contextlib.contextmanager
    def _death_raised(self) -> Iterator[None]:
        """Raise `DecoderDiedError` where in the block the pipe breaks or what comes through it is no message."""
        try:
            yield
        except (BrokenPipeError, BrokenMessageError):
            raise self._death() from None

    def _death(self) -> DecoderDiedError:
        """How the process ended; one that sends nonsense is ended here."""
        try:
            code: int | None = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        return DecoderDiedError(code)


def _error(reply: dict[str, Any]) -> Exception | None:
    """The exception that a reply stands for, if any. Raises a built-in error on what child.py does not send."""
    match reply["is"]:
        case "bad" if reply["strained"]:
            return StrainedError(reply["reason"])
        case "bad":
            return BadData(reply["reason"])
        case "store_error":
            return StoreError(reply["message"], reply["reason"], reply["kind"])
        case "user_error":
            return UserError(reply["message"])
        case "os_error":
            kind = getattr(builtins, reply["kind"])
            return kind(*reply["args"]) if issubclass(kind, OSError) else None
        case "failure":
            return RuntimeError(f"in the decoder process: {reply['traceback']}")
    return None
