"""The door to decoder processes. In: where bytes are. Out: the frames, records or samples in them, even if a process
dies.

A process answers one request at a time and is kept for the thread's next one of its kind. One that crashes is replaced
once, and then the data is `BadData`; so is too much processor time, at once, and a lack of memory, found in a process
that has had no other request. A process that was killed from outside says nothing about the data: it is replaced a few
times, and then an OSError is raised, which the caller may retry. No answer is yielded twice.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.decoder.content import Content, Served, send_read
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.decoder.messages import BrokenMessageError, fields_of, receive, receive_block, send
from pipelines.decoder.sandbox import clean_environment
from storage.errors import BadData
from tokenization.media.frame_sampling import FrameChunk, FrameRequest
from tokenization.media.kinds import MediaKind
from tokenization.readers.record import BadRecord, Record
from tokenization.readers.rows import TextColumns, unpack_records, unpack_samples, unpack_texts
from tokenization.readers.webdataset_tar import BadSample, Sample

log = logging.getLogger("ringworld")

MEDIA, TABLES = "pipelines.decoder.media_child", "pipelines.decoder.table_child"
"""The modules that the two kinds of processes run."""

_KILLS = 4  # of processes in a row, without an answer between them
_EXIT_SECONDS = 5  # that a process that has closed its pipe may take to end
_MAX_BATCH_BYTES = 1 << 30  # of Arrow: several columns, each with a value of the largest size

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
    return _answers(lambda decoder: decoder.frames(content, kind, request), MEDIA, limits)


def counted_samples(content: Content, fps: float, limits: Limits = DEFAULT_LIMITS) -> int:
    """Samples of a whole video, by `tokenization.media.video.count_samples`. Raises as `decoded_frames` does."""
    (count,) = _answers(lambda decoder: iter([decoder.count(content, fps)]), MEDIA, limits)
    return count


def parsed_records(
    content: Content, name: str, columns: Sequence[str], limits: Limits = DEFAULT_LIMITS
) -> Iterator[Record | BadRecord]:
    """Records as `tokenization.readers.records.read_records` reads them, with the fields of these columns alone.

    name: what the extension is of. A value that is neither text nor bytes nor VQGAN codes is a `NotText`. Raises as
    `decoded_frames` does, and BadData where most records are bad, after those before.
    """
    return chain.from_iterable(_answers(lambda decoder: decoder.records(content, name, columns), TABLES, limits))


def parsed_texts(
    content: Content, name: str, columns: Sequence[str], limits: Limits = DEFAULT_LIMITS
) -> Iterator[TextColumns]:
    """The same records, some at a time, with their texts in columns. Raises as `parsed_records` does."""
    return _answers(lambda decoder: decoder.texts(content, name, columns), TABLES, limits)


def known_columns(content: Content, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[list[str], bool]:
    """Names of fields as `tokenization.readers.records.column_names` finds them. Raises as `decoded_frames` does."""
    ((names, is_whole),) = _answers(lambda decoder: iter([decoder.columns(content, name)]), TABLES, limits)
    return names, is_whole


def tar_samples(
    content: Content, columns: Sequence[str], limits: Limits = DEFAULT_LIMITS
) -> Iterator[Sample | BadSample]:
    """Samples as `tokenization.readers.webdataset_tar.read_samples` reads them; raises as `decoded_frames` does."""
    return chain.from_iterable(_answers(lambda decoder: decoder.samples(content, columns), TABLES, limits))


def _answers(ask: Callable[[DecoderProcess], Iterator[Answer]], kind: str, limits: Limits) -> Iterator[Answer]:
    """What a process answers, each answer once, over as many processes as it takes."""
    yielded = kills = 0
    fresh = has_crashed = False
    while True:
        try:
            with _decoder(kind, limits, fresh) as decoder:
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
            if death.signal == signal.SIGXCPU:  # which a second process would take again
                allowed = f"tokenize.decoder_cpu_seconds allows ({limits.cpu_seconds})"
                raise BadData(f"decoding it takes more processor time than {allowed} for what it has given") from None
            if has_crashed:
                raise BadData(f"decoding it makes the decoder crash ({death})") from None
            fresh = has_crashed = True


_kept = threading.local()  # by kind the process of this thread, which the kernel ends with the thread
os.register_at_fork(after_in_child=lambda: vars(_kept).clear())  # the pipes are the parent's


@contextlib.contextmanager
def _decoder(kind: str, limits: Limits, fresh: bool) -> Iterator[DecoderProcess]:
    """The process of a kind that this thread keeps, or a new one: always where it is to be `fresh`."""
    decoder: DecoderProcess | None = vars(_kept).pop(kind, None)
    if decoder is not None and (fresh or not decoder.alive or decoder.limits != limits):
        decoder.close()
        decoder = None
    decoder = decoder or DecoderProcess(kind, limits)
    try:
        yield decoder
    except StrainedError:
        decoder.close()
        raise
    finally:
        if decoder.idle and decoder.alive and kind not in vars(_kept):
            vars(_kept)[kind] = decoder
        else:
            decoder.close()


@atexit.register
def close_idle() -> None:
    """End the processes that this thread keeps."""
    while vars(_kept):
        vars(_kept).popitem()[1].close()


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
    """A running decoder. fresh: it has had no request. idle: it waits for one, and all its answers have been taken."""

    def __init__(self, kind: str, limits: Limits) -> None:
        """Start it. Raises OSError where that is impossible now, RuntimeError where it always is."""
        self.limits, self.fresh, self.idle = limits, True, False
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", kind],  # -P: not what the working directory may hold
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                bufsize=0,
                pipesize=1 << 20,
                env=clean_environment([path or os.getcwd() for path in sys.path]),
            )
        assert self._process.stdout
        self._to, self._from = self._connection.fileno(), self._process.stdout.fileno()
        try:
            with self._death_raised():
                send(self._to, {"parent": os.getpid(), "limits": asdict(limits)})
            if not self._receive()["is_confined"]:
                log.warning("this kernel confines no decoder process: one that data takes over may reach the network")
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
        size = request.size
        for reply in self._ask(content, {"do": "frames", "kind": kind, "frames": fields_of(request)}):
            count = int(reply["count"])
            if not 0 < count <= request.chunk:
                raise self._death()
            times, frames = np.empty(count), np.empty((count, size, size, 3), dtype=np.uint8)
            with self._death_raised():
                receive_block(self._from, times)
                receive_block(self._from, frames)
            yield FrameChunk(frames, times, reply["total"])

    def count(self, content: Content, fps: float) -> int:
        """Samples of a video as `count_samples` counts them; raises as `frames` does."""
        (reply,) = self._ask(content, {"do": "count", "fps": fps})
        return int(reply["count"])

    def records(self, content: Content, name: str, columns: Sequence[str]) -> Iterator[list[Record | BadRecord]]:
        """Records as `read_records` reads them, some at a time; raises as `frames` does."""
        for batch in self._batches(content, {"do": "records", "name": name, "columns": columns}):
            yield self._unpacked(unpack_records, batch, columns)

    def texts(self, content: Content, name: str, columns: Sequence[str]) -> Iterator[TextColumns]:
        """The same with their texts in columns; raises as `frames` does."""
        for batch in self._batches(content, {"do": "records", "name": name, "columns": columns}):
            yield self._unpacked(unpack_texts, batch, columns)

    def columns(self, content: Content, name: str) -> tuple[list[str], bool]:
        """Names of fields as `column_names` finds them; raises as `frames` does."""
        (reply,) = self._ask(content, {"do": "columns", "name": name})
        return list(map(str, reply["names"])), bool(reply["is_whole"])

    def samples(self, content: Content, columns: Sequence[str]) -> Iterator[list[Sample | BadSample]]:
        """Samples as `read_samples` reads them, some at a time; raises as `frames` does."""
        for batch in self._batches(content, {"do": "samples", "columns": columns}):
            yield self._unpacked(unpack_samples, batch, columns)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.idle = False
        self._process.kill()
        self._connection.close()
        if self._process.stdout:
            self._process.stdout.close()
        self._process.wait()

    def _batches(self, content: Content, request: dict[str, Any]) -> Iterator[bytearray]:
        for reply in self._ask(content, request):
            size = int(reply["bytes"])
            if not 0 < size <= _MAX_BATCH_BYTES:
                raise self._death()
            with self._death_raised():
                receive_block(self._from, batch := bytearray(size))
            yield batch

    def _ask(self, content: Content, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The replies to a request, of which the taker receives the blocks; meanwhile the process gets the content."""
        with content.opened() as file:
            served = Served(content, file)
            self.fresh = self.idle = False
            with self._death_raised():
                send(self._to, {**request, "content": served.fields})
                served.hand_over(self._connection)
            while (reply := self._receive())["is"] != "end":
                if reply["is"] != "read":
                    yield reply
                    continue
                try:
                    parts = served.read(reply)
                except BrokenMessageError:
                    raise self._death() from None
                with self._death_raised():
                    send_read(self._to, parts)

    def _unpacked(self, unpack: Callable[[Any, Sequence[str]], Answer], batch: Any, columns: Sequence[str]) -> Answer:
        try:
            return unpack(batch, columns)
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, StopIteration):
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        with self._death_raised():
            reply = receive(self._from)
            error = _error(reply)
        self.idle = reply["is"] in ("ready", "end", "bad", "failure")
        if error is not None:
            raise error
        return reply

    @contextlib.contextmanager
    def _death_raised(self) -> Iterator[None]:
        """Raise `DecoderDiedError` where in the block the pipe breaks or what comes through it is nonsense."""
        try:
            yield
        except (BrokenPipeError, ConnectionResetError, BrokenMessageError):
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
    """The exception that a reply stands for, if any. Raises BrokenMessageError on what child.py does not send."""
    match reply:
        case {"is": "bad", "strained": True, "reason": None | str() as reason}:
            return StrainedError(reason)
        case {"is": "bad", "strained": False, "reason": str() as reason}:
            return BadData(reason)
        case {"is": "failure", "traceback": str() as trace}:
            return RuntimeError(f"in the decoder process: {trace}")
        case {"is": "frames", "count": int(), "total": None | int()} | {"is": "count", "count": int()}:
            return None
        case {"is": "rows", "bytes": int()}:
            return None
        case {"is": "columns", "names": list(), "is_whole": bool()}:
            return None
        case {"is": "ready", "is_confined": bool()} | {"is": "read" | "end"}:
            return None
    raise BrokenMessageError("not a reply of child.py")
