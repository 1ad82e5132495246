"""A video or an image to frames.

In: a binary file. Out: chunks of square frames with their times, an image as one frame at time 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from storage.errors import BadData
from tokenization.media.frame_sampling import FrameChunk, FrameRequest
from tokenization.media.image import load_image
from tokenization.media.kinds import MediaKind
from tokenization.media.video import decode_frames


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
