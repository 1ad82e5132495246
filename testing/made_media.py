"""Media made for tests: videos of given pictures and clocks, the parts of real ones, and pictures that are bombs."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def encoded(
    pictures: Iterable[np.ndarray],
    *,
    stamps: list[int] | None = None,
    codec: str = "ffv1",
    container: str = "matroska",
    time_base: Fraction = Fraction(1, 1000),
    rate: int = 25,
    pixels: str = "gray",
    aspect: Fraction | None = None,
    matrix: list[int] | None = None,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
) -> bytes:
    """A video file of these pictures, each shown from its stamp (in time_base) on; matrix: its display matrix.

    options: of the encoder. muxing: of the container.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=muxing or {}) as file:
        stream: Any = None
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = file.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixels
                stream.codec_context.time_base = time_base
                if aspect is not None:
                    stream.codec_context.sample_aspect_ratio = aspect
                stream.set_display_matrix(matrix)
            frame = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
            frame.pts = number * int(1 / (rate * time_base)) if stamps is None else stamps[number]
            frame.time_base = time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def quadrants(height: int, width: int) -> np.ndarray:
    """A picture whose four quarters of the *central square* are red, green, blue and white, the rest black."""
    side = min(height, width)
    top, left, half = (height - side) // 2, (width - side) // 2, side // 2
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    for row, column, colour in ((0, 0, (255, 0, 0)), (0, 1, (0, 255, 0)), (1, 0, (0, 0, 255)), (1, 1, (255,) * 3)):
        y, x = top + row * half, left + column * half
        picture[y : y + half, x : x + half] = colour
    return picture


def corners(frame: np.ndarray) -> list[str]:
    """The colours of a frame's quarters, top left first, row by row."""
    quarter = len(frame) // 4
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    points = [frame[y, x] for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)]
    return [names.get(tuple((point > 127).astype(int)), str(point)) for point in points]


def remuxed(path: Path, container: str, target: Path, options: dict[str, str] | None = None) -> Path:
    """The same packets in another container, as a muxer with these options writes it."""
    with av.open(str(path)) as source, av.open(str(target), "w", format=container, options=options or {}) as file:
        old = source.streams.video[0]
        new = file.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.dts is not None:
                packet.stream = new
                file.mux(packet)
    return target


def recoded(path: Path, target: Path, options: dict[str, str], codec: str = "libx264") -> Path:
    """The same pictures, small, by an encoder with these options."""
    with av.open(str(path)) as source, av.open(str(target), "w") as file:
        stream = file.add_stream(codec, rate=30, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in source.decode(video=0):
            small = frame.reformat(96, 64, "yuv420p")
            small.pict_type = 0  # the encoder chooses anew which frames are made from which
            file.mux(stream.encode(small))
        file.mux(stream.encode(None))
    return target


def sound(clip: Path, container: str, picture: bytes | None = None) -> bytes:
    """The sound of a real clip, alone or with a cover."""
    out = io.BytesIO()
    with av.open(str(clip)) as source, av.open(out, "w", format=container) as file:
        track = source.streams.audio[0]
        new = file.add_stream_from_template(track)
        cover: Any = None
        if picture is not None:
            cover = file.add_stream("png", rate=1)
            cover.width = cover.height = 16
            cover.pix_fmt = "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
            file.mux(cover.encode(frame))
        for packet in source.demux(track):
            if packet.dts is not None:
                packet.stream = new
                file.mux(packet)
    return out.getvalue()


def gif_bomb(side: int, frames: int) -> bytes:
    """A GIF of side x side pixels whose frames, a hundredth of a second each, change one of them: 23 bytes a frame."""
    head = b"GIF89a" + side.to_bytes(2, "little") * 2 + bytes([0x80, 0, 0, 0, 0, 0, 255, 255, 255])
    control = b"\x21\xf9\x04\x04\x01\0\0\0"
    picture = b"\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    return head + (control + picture) * frames + b";"


def whole_png(side: int) -> bytes:
    """A PNG of side x side pixels in a file a thousandth of that."""
    return png_bomb(side, side).getvalue()


def png_bomb(side: int, rows: int = 1000) -> io.BytesIO:
    """A PNG that says it is of side x side pixels and has some rows of them, in a file a thousandth of that."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(min(side, rows))) + packer.flush()
    return io.BytesIO(png({b"IHDR": header, b"IDAT": pixels, b"IEND": b""}))


def png(chunks: dict[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    file = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        file += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    return file
