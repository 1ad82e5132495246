"""The part of a picture that its container says is shown: MOV's clean aperture, Matroska's pixel crop.

In: a video stream. Out: the pixels to cut off at each side. FFmpeg reads them, and its command line cuts them off, but
PyAV tells only a muxer of them. So the header of an empty Matroska file is written for the stream, and read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import av
from av.error import FFmpegError
from av.video.stream import VideoStream

_SEGMENT, _TRACKS, _TRACK, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0
_SIDES = {0x54CC: "left", 0x54BB: "top", 0x54DD: "right", 0x54AA: "bottom"}


@dataclass(frozen=True)
class Cropping:
    """Pixels to cut off a decoded frame at each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))


def cropping_of(stream: VideoStream) -> Cropping:
    """What the stream's container wants cut off; nothing where Matroska does not know the codec."""
    header = io.BytesIO()
    try:
        with av.open(header, "w", format="matroska") as file:
            file.add_stream_from_template(stream, opaque=True)  # by its decoder: there may be no encoder
            file.start_encoding()
    except (FFmpegError, ValueError):
        return Cropping()
    content = memoryview(header.getvalue())
    for name in (_SEGMENT, _TRACKS, _TRACK, _VIDEO):
        content = next((body for number, body in _elements(content) if number == name), memoryview(b""))
    return Cropping(**{_SIDES[name]: int.from_bytes(body) for name, body in _elements(content) if name in _SIDES})


def _elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The EBML elements of a body: the number of each, its marker included (RFC 8794), and its body."""
    while len(content):
        name_length = 9 - content[0].bit_length()
        size_length = 9 - content[name_length].bit_length()
        begin = name_length + size_length
        marked = int.from_bytes(content[name_length:begin])
        size = marked & ((1 << 7 * size_length) - 1)
        yield int.from_bytes(content[:name_length]), content[begin : begin + size]
        content = content[begin + size :]
