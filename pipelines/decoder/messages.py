"""Messages over a pipe: JSON of known fields, and blocks of raw bytes after it. No pickle: one end may be hostile.

A message is the length of its JSON (4 bytes), the JSON, and the blocks, whose lengths the receiver knows from the JSON.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

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


def _write(fd: int, buffer: Any) -> None:
    view = memoryview(buffer).cast("B")
    while len(view):
        view = view[os.write(fd, view[:_PIECE]) :]
