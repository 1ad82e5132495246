"""Frames as PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.evaluate.job import EvaluateJob
from storage.store import Store

_GAP = 2


def strip(rows: list[np.ndarray], given: int = 0) -> np.ndarray:
    """RGBA [h, w, 4] of rows of frames uint8 [n, H, W, 3] set side by side with transparent gaps.

    given: frames of each row that a gap wider by an eighth of a frame sets apart from the rest.
    """
    height, width = rows[0].shape[1:3]
    columns = max(map(len, rows))
    apart = width // 8 if given else 0
    shape = (len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP + apart, 4)
    canvas = np.zeros(shape, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            top, left = y * (height + _GAP), x * (width + _GAP) + (apart if x >= given else 0)
            canvas[top : top + height, left : left + width, :3] = frame
            canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def save_png(store: Store, name: str, picture: np.ndarray) -> str:
    """Commit a picture, uint8 [h, w, 3 or 4], and return its name."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    with store.writing(name) as file:
        file.write(buffer.getvalue())
    return name


def keep_picture(job: EvaluateJob, name: str, picture: np.ndarray) -> str:
    """The same of a cell, once for all its ranks."""
    return save_png(job.store, name, picture) if job.is_first else name
