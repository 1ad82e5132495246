"""Messages over a pipe: JSON of known fields, and blocks of raw bytes after it. No pickle: one end may be hostile.

A message is the length of its JSON (4 bytes), the JSON, and the blocks, whose lengths the receiver knows from the JSON.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tokenization.media.frame_sampling import FrameRequest, Samples

_LENGTH = struct.Struct("<I")
_LONGEST = 1 << 20  # of the JSON
_PIECE = 1 << 20  # of one system call


class BrokenMessageError(Exception):
    """The pipe ended, or what came through it is no message."""


def send(fd: int, fields: dict[str, Any], *blocks: Any) -> None:
    """Write a message; blocks are buffers. Waits while the pipe is full. Raises BrokenPipeError."""
    text = json.dumps(fields).encode()
    _write(fd, _LENGTH.pack(len(text)) + text)
    for block in blocks:
        _write(fd, block)


def receive(fd: int) -> dict[str, Any] | None:
    """The JSON of the next message, or None where the pipe has ended. Raises BrokenMessageError."""
    head = bytearray(_LENGTH.size)
    if not (got := os.readv(fd, [head])):
        return None
    receive_block(fd, memoryview(head)[got:])
    (length,) = _LENGTH.unpack(head)
    if length > _LONGEST:
        raise BrokenMessageError(f"a message of {length} bytes")
    text = bytearray(length)
    receive_block(fd, text)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenMessageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BrokenMessageError(f"{type(fields).__name__}, not an object")
    return fields


def receive_block(fd: int, buffer: Any) -> None:
    """Fill a writable buffer. Raises BrokenMessageError where the pipe ends before."""
    view = memoryview(buffer).cast("B")
    while len(view):
        got = os.readv(fd, [view[:_PIECE]])
        if not got:
            raise BrokenMessageError("the pipe ended inside a message")
        view = view[got:]


def request_message(request: FrameRequest) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A request for frames as JSON, and the block of its sample numbers that follows, if it has any."""
    fields = asdict(replace(request, samples=None))
    if request.samples is None:
        return fields, []
    numbers = np.ascontiguousarray(request.samples.numbers, dtype=np.int64)
    fields["samples"] = {"count": len(numbers), "to_end": bool(request.samples.to_end)}
    return fields, [numbers] if len(numbers) else []


def receive_request(fd: int, fields: dict[str, Any]) -> FrameRequest:
    """The request that `request_message` wrote, whose block comes next. Raises BrokenMessageError."""
    samples = None
    if fields["samples"] is not None:
        receive_block(fd, numbers := np.empty(fields["samples"]["count"], dtype=np.int64))
        samples = Samples(numbers, fields["samples"]["to_end"])
    return FrameRequest(**{**fields, "part": tuple(fields["part"]), "samples": samples})


def _write(fd: int, buffer: Any) -> None:
    view = memoryview(buffer).cast("B")
    while len(view):
        view = view[os.write(fd, view[:_PIECE]) :]
