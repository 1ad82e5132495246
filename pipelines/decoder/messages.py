"""Messages over a pipe: JSON of known fields, and blocks of raw bytes after it. No pickle: one end may be hostile.

A message is the length of its JSON (4 bytes), the JSON, and the blocks, whose lengths the receiver knows from the JSON.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tokenization.media.frame_sampling import FrameRequest, Samples
from tokenization.media.frames import MediaKind

_LENGTH = struct.Struct("<I")
_MAX_CALL_BYTES = 1 << 20


class BrokenMessageError(Exception):
    """The pipe ended, or what came through it is no message."""


@dataclass(frozen=True)
class Content:
    """Where a medium's bytes are: those at a URL, a window of them (offset, size), or here, `held` already.

    etag: as a listing has it; another version is an error. None: whichever is there.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    window: tuple[int, int] | None = None
    held: bytes | bytearray | None = None
    etag: str | None = None


def send(fd: int, fields: dict[str, Any], *blocks: Any) -> None:
    """Write a message; blocks are buffers. Waits while the pipe is full. Raises BrokenPipeError."""
    text = json.dumps(fields).encode()
    for block in (_LENGTH.pack(len(text)) + text, *blocks):
        view = memoryview(block).cast("B")
        while len(view):
            view = view[os.write(fd, view[:_MAX_CALL_BYTES]) :]


def receive(fd: int, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """The JSON of the next message. Raises BrokenMessageError, also where the pipe has ended."""
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
    """Fill a writable buffer. Raises BrokenMessageError where the pipe ends before."""
    view = memoryview(buffer).cast("B")
    while len(view):
        got = os.readv(fd, [view[:_MAX_CALL_BYTES]])
        if not got:
            raise BrokenMessageError("the pipe ended")
        view = view[got:]


def send_request(fd: int, content: Content, kind: MediaKind | None, wanted: FrameRequest | float) -> None:
    """Ask for frames of a medium, or for the number of its samples at `wanted` per second. Raises BrokenPipeError."""
    held = content.held
    place = asdict(content if held is None else Content(content.url))  # no credentials where none are needed
    request: Any = wanted
    if isinstance(wanted, FrameRequest):
        request = asdict(wanted)
        if wanted.samples is not None:
            request["samples"]["numbers"] = wanted.samples.numbers.tolist()
    fields = {"content": place, "held": None if held is None else len(held), "kind": kind, "wanted": request}
    send(fd, fields, held or b"")


def receive_request(fd: int) -> tuple[Content, MediaKind | None, FrameRequest | float]:
    """What `send_request` wrote. Raises BrokenMessageError, also where the pipe has ended."""
    fields = receive(fd, max_bytes=1 << 30)
    wanted, held = fields["wanted"], None
    if fields["held"] is not None:
        receive_block(fd, held := bytearray(fields["held"]))
    if isinstance(wanted, dict):
        if (samples := wanted["samples"]) is not None:
            samples = Samples(np.array(samples["numbers"], dtype=np.int64), samples["to_end"])
        wanted = FrameRequest(**{**wanted, "part": tuple(wanted["part"]), "samples": samples})
    return Content(**{**fields["content"], "held": held}), fields["kind"], wanted
