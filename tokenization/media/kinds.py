"""Whether a file is a video or an image, by the extension of its name."""

from __future__ import annotations

import posixpath
from typing import Literal

MediaKind = Literal["video", "image"]

VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def kind_by_name(name: str) -> MediaKind | None:
    """The kind of a file; None for any other extension."""
    extension = posixpath.splitext(name)[1].lower()
    return "video" if extension in VIDEOS else "image" if extension in IMAGES else None
