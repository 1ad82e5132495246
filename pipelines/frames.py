"""Frames of a listed video or image: the one way in which every stage looks at a raw object."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from pipelines.sources import SourceObject
from pipelines.urls import open_url
from tokenization.image import load_image
from tokenization.video import FrameChunk, count_samples, decode_frames


def object_frames(
    found: SourceObject,
    options: dict[str, Any],
    *,
    fps: float,
    size: int,
    chunk: int,
    max_frames: int | None = None,
) -> Iterator[FrameChunk]:
    """Frames uint8 [n, size, size, 3] with their times, at most `chunk` at a time; an image is one frame at time 0.

    Of a video only the object's `part`, cut at whole samples, so that the parts of a video share it out exactly. Raises
    BadData on what cannot be decoded, OSError on what cannot be reached.
    """
    with open_url(found.url, options) as file:
        if found.kind == "image":
            yield FrameChunk(load_image(file, size)[None], np.zeros(1))
            return
        start, end = found.part
        total = count_samples(file, fps) if (start, end) != (0.0, 1.0) else 0
        yield from decode_frames(
            file,
            fps=fps,
            size=size,
            chunk=chunk,
            max_frames=max_frames,
            start=int(total * start) / Fraction(fps),
            end=int(total * end) / Fraction(fps) if end < 1.0 else None,
        )
