"""A video or an image to frames; its kind is found by the extension of its name, or else by its bytes.

In: a name; a binary file. Out: its kind; chunks of square frames with their times, an image as one frame at time 0.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np

from storage.errors import BadData
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.image import load_image
from tokenization.media.video import FrameChunk, decode_frames

MediaKind = Literal["video", "image"]

VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def kind_by_name(name: str) -> MediaKind | None:
    """The kind of a file by the extension of its name; None for any other extension."""
    extension = posixpath.splitext(name)[1].lower()
    return "video" if extension in VIDEOS else "image" if extension in IMAGES else None


def media_frames(file: BinaryIO, kind: MediaKind | None, request: FrameRequest) -> Iterator[FrameChunk]:
    """Frames, uint8 [n, size, size, 3], in chunks of at most `request.chunk`.

    `kind` None tries an image first, then a video. Raises BadData on any other file; errors of reading it pass through.
    """
    if kind != "video":
        try:
            yield FrameChunk(load_image(file, request.size)[None], np.zeros(1))
            return
        except BadData:
            if kind == "image":
                raise
    yield from decode_frames(file, request)
