"""A video or an image, whichever it is, to frames: by the extension of its name, or by what its bytes are.

In: a name; a binary file. Out: its kind; chunks of square frames with their times, an image as one frame at time 0.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np

from storage.errors import BadData
from tokenization.media.frame_sampling import Samples, choose_samples
from tokenization.media.image import load_image
from tokenization.media.video import FrameChunk, count_samples, decode_frames

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
    samples: Samples | None = None,
) -> Iterator[FrameChunk]:
    """Frames uint8 [n, size, size, 3] with their times, at most `chunk` at a time.

    kind: None tries an image first, then a video. max_frames, part: of a video, as `choose_samples` has them, which
    takes a pass over its packets. samples: of a video that has been looked at, what to take instead. Raises BadData on
    what cannot be decoded; errors of the file pass through.
    """
    if kind != "video":
        try:
            yield FrameChunk(load_image(file, size)[None], np.zeros(1))
            return
        except BadData:
            if kind == "image":
                raise
    if samples is None and (max_frames is not None or part != (0.0, 1.0)):
        samples = choose_samples(count_samples(file, fps), max_frames, part)
    yield from decode_frames(file, fps=fps, size=size, chunk=chunk, samples=samples)
