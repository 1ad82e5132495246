"""A video is shown as FFmpeg's command line shows it: turned and mirrored by its display matrix."""

from __future__ import annotations

import io
import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from testing.made_media import corners, encoded, quadrants
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import decode_frames

ONE = 1 << 16


def shown(video: bytes, size: int = 32) -> np.ndarray:
    """The first frame."""
    return next(decode_frames(io.BytesIO(video), FrameRequest(fps=25, size=size))).frames[0]


def with_matrix(a: float, b: float, c: float, d: float, shape: tuple[int, int] = (64, 96)) -> bytes:
    matrix = [round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, 1 << 30]
    return encoded([quadrants(*shape)] * 2, codec="libx264", container="mp4", pixels="yuv444p", matrix=matrix)


# (a, b, c, d): a pixel at (x, y) is shown at (ax + cy, bx + dy). What becomes of the rows red green, blue white.
EIGHT = {
    "as it is": ((1, 0, 0, 1), ["red", "green", "blue", "white"]),
    "turned by 90 degrees": ((0, 1, -1, 0), ["blue", "red", "white", "green"]),
    "turned by 180 degrees": ((-1, 0, 0, -1), ["white", "blue", "green", "red"]),
    "turned by 270 degrees": ((0, -1, 1, 0), ["green", "white", "red", "blue"]),
    "mirrored left and right": ((-1, 0, 0, 1), ["green", "red", "white", "blue"]),
    "mirrored up and down": ((1, 0, 0, -1), ["blue", "white", "red", "green"]),
    "transposed": ((0, 1, 1, 0), ["red", "blue", "green", "white"]),
    "transposed the other way": ((0, -1, -1, 0), ["white", "green", "blue", "red"]),
}


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("kind", EIGHT)
def test_each_of_the_eight_orientations_stands_upright(kind: str, shape: tuple[int, int]) -> None:
    matrix, expected = EIGHT[kind]
    assert corners(shown(with_matrix(*matrix, shape=shape))) == expected


def test_any_other_angle_turns_within_a_picture_that_stays_as_large() -> None:
    angle = math.radians(45)
    turned = with_matrix(math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle))
    frame = shown(turned, 64)
    middles = {name: frame[y, x] > 127 for name, y, x in (("up", 8, 32), ("right", 32, 56), ("down", 56, 32))}
    assert {name: tuple(colour.astype(int)) for name, colour in middles.items()} == {
        "up": (1, 0, 0),
        "right": (0, 1, 0),
        "down": (1, 1, 1),
    }


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)])
def test_a_matrix_that_leaves_nothing_turns_nothing(matrix: tuple[int, int, int, int]) -> None:
    assert corners(shown(with_matrix(*matrix))) == EIGHT["as it is"][1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_of_motion_jpeg_is_its_frames(orientation: int) -> None:
    upright = Image.fromarray(quadrants(64, 96))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Image.Transpose
    exif, picture = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    stored.save(picture, "JPEG", quality=95, subsampling=0, exif=exif)
    video = io.BytesIO()
    with av.open(video, "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = *stored.size, "yuvj444p"
        packet = av.Packet(picture.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 25)
        file.mux(packet)
    assert corners(shown(video.getvalue())) == EIGHT["as it is"][1]
