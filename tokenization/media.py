"""A video or an image, whichever it is, to frames: by the extension of its name, or by what its bytes are.

In: a name; a binary file. Out: its kind; chunks of square frames with their times, an image as one frame at time 0.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO, Literal

import numpy as np

from tokenization.errors import BadData
from tokenization.image import load_image
from tokenization.video import FrameChunk, count_samples, decode_frames

MediaKind = Literal["video", "image"]

VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def kind_by_name(name: str) -> MediaKind | None:
    """What a file is by the extension of its name; None where that does not tell."""
    extension = posixpath.splitext(name)[1].lower()
    return "video" if extension in VIDEOS else "image" if extension in IMAGES else None


def media_frames(
    file: BinaryIO,
    kind: MediaKind | None,
    *,
    fps: float,
    size: int,
    chunk: int,
    max_frames: int | None = None,
    part: tuple[float, float] = (0.0, 1.0),
) -> Iterator[FrameChunk]:
    """Frames uint8 [n, size, size, 3] with their times, at most `chunk` at a time.

    kind: None tries an image first, then a video. part: the share of a video to take, cut at whole samples, so that the
    parts of a video share it out exactly. Raises BadData on what cannot be decoded; errors of the file pass through.
    """
    if kind != "video":
        try:
            yield FrameChunk(load_image(file, size)[None], np.zeros(1))
            return
        except BadData:
            if kind == "image":
                raise
    start, end = part
    total = count_samples(file, fps) if part != (0.0, 1.0) else 0
    yield from decode_frames(
        file,
        fps=fps,
        size=size,
        chunk=chunk,
        max_frames=max_frames,
        start=int(total * start) / Fraction(fps),
        end=int(total * end) / Fraction(fps) if end < 1.0 else None,
    )
