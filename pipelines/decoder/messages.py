"""Messages over a pipe or a socket: JSON of known fields, and blocks of raw bytes after it. No pickle: one end may be
hostile.

A message is the length of its JSON (4 bytes), the JSON, and the blocks, whose lengths the receiver knows from the JSON.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenization.media.frame_sampling import FrameRequest, Samples

_LENGTH = struct.Struct("<I")
_MAX_CALL_BYTES = 1 << 20


class BrokenMessageError(Exception):
    """The other end is gone, or what came from it is no message."""


def send(fd: int, fields: dict[str, Any], *blocks: Any) -> None:
    """Write a message; blocks are buffers. Waits while the pipe is full. Raises BrokenPipeError."""
    text = json.dumps(fields).encode()
    for block in (_LENGTH.pack(len(text)) + text, *blocks):
        send_block(fd, block)


def send_block(fd: int, buffer: Any) -> None:
    """Write a buffer of which the receiver knows the length. Raises BrokenPipeError."""
    view = memoryview(buffer).cast("B")
    while len(view):
        view = view[os.write(fd, view[:_MAX_CALL_BYTES]) :]


def receive(fd: int, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """The JSON of the next message. Raises BrokenMessageError, also where the other end is gone."""
    receive_block(fd, head := bytearray(_LENGTH.size))
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise BrokenMessageError(f"a message of {length} bytes")
    receive_block(fd, text := bytearray(length))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenMessageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BrokenMessageError(f"{type(fields).__name__}, not an object")
    return fields


def receive_block(fd: int, buffer: Any) -> None:
    """Fill a writable buffer. Raises BrokenMessageError where the other end is gone before."""
    view = memoryview(buffer).cast("B")
    while len(view):
        try:
            got = os.readv(fd, [view[:_MAX_CALL_BYTES]])
        except ConnectionResetError:  # of a socket whose other end has not read all
            got = 0
        if not got:
            raise BrokenMessageError("the other end is gone")
        view = view[got:]


def fields_of(request: FrameRequest) -> dict[str, Any]:
    """A request for frames as the fields of a message."""
    fields = asdict(request)
    if request.samples is not None:
        fields["samples"]["numbers"] = request.samples.numbers.tolist()
    return fields


def frame_request(fields: dict[str, Any]) -> FrameRequest:
    """The request that `fields_of` made fields of."""
    if (samples := fields["samples"]) is not None:
        samples = Samples(np.array(samples["numbers"], dtype=np.int64), samples["to_end"])
    return FrameRequest(**{**fields, "part": tuple(fields["part"]), "samples": samples})
