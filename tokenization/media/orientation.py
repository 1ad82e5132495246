"""The display matrix of a video to FFmpeg's filters that set its pictures upright, as its command line does by itself.

In: a decoded frame; its display matrix. Out: the filters, by name and arguments. The matrix is that of the stream (a
phone or a front camera writes it) or of the frame (H.264's and HEVC's display orientation, the EXIF of Motion JPEG),
whichever FFmpeg prefers; it has handed that to the frame.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from av.sidedata import sidedata
from av.video.frame import VideoFrame

_NINE_NUMBERS = struct.Struct("=9i")

Matrix = tuple[int, ...]
Filter = tuple[str, str]


def _unnamed(kinds: type[sidedata.Type], value: int) -> Any:
    kind: Any = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNNAMED_{value}", value
    return kind


# PyAV refuses to list a frame's side data where one is of a kind that it has no name for: EXIF, the view of 3D video.
sidedata.Type._missing_ = classmethod(_unnamed)  # type: ignore[assignment]


def display_matrix(frame: VideoFrame) -> Matrix | None:
    """The nine numbers of the frame's display matrix, in FFmpeg's order; None if it has none."""
    sides: Any = frame.side_data
    data = sides.get(sidedata.Type.DISPLAYMATRIX)
    return None if data is None or data.buffer_size != _NINE_NUMBERS.size else _NINE_NUMBERS.unpack(bytes(data))


def odd_angle(matrix: Matrix | None) -> Filter | None:
    """The filter that turns a frame by what is no quarter turn, in a picture that stays as large; None if none does."""
    theta = _clockwise(matrix)
    if theta is None or _is_quarter(theta) or theta == 1:  # FFmpeg lets one degree be
        return None
    return "rotate", f"{theta}*PI/180"


def quarter_turns(matrix: Matrix | None) -> list[Filter]:
    """The filters for quarter turns and mirrors, which can follow the cropping to a central square."""
    theta = _clockwise(matrix)
    if matrix is None or theta is None or not _is_quarter(theta):
        return []
    match round(theta / 90):
        case 1:
            return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
        case 3:
            return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
        case 2:
            return [*([("hflip", "")] if matrix[0] < 0 else []), *([("vflip", "")] if matrix[4] < 0 else [])]
    return [("vflip", "")] if matrix[4] < 0 else []


def _clockwise(matrix: Matrix | None) -> int | None:
    """Whole degrees, 0 to 359, by which the frame is to be turned (FFmpeg's av_display_rotation_get)."""
    if matrix is None:
        return None
    first, second = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not first or not second:
        return None
    return round(math.degrees(math.atan2(matrix[1] / second, matrix[0] / first))) % 360


def _is_quarter(theta: int) -> bool:
    return theta % 90 == 0
