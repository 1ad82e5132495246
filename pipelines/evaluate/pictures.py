"""Frames of raw objects, the VQGAN that they go through, and frames as PNG."""

from __future__ import annotations

import io
import itertools

import numpy as np
from PIL import Image

from pipelines.codecs.vqgan import load_vqgan
from pipelines.evaluate.job import EvaluateJob
from pipelines.recipe import Recipe
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import object_frames
from storage.store import Store
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.media.frame_sampling import FrameRequest

_GAP = 2


def run_vqgan(job: EvaluateJob) -> VQGAN:
    """The run's VQGAN."""
    assert job.recipe.vqgan is not None
    assert job.codec is not None
    return load_vqgan(job.codec.store, job.recipe.vqgan, device=job.device)


def sampled_frames(found: SourceObject, recipe: Recipe, size: int, most: int) -> np.ndarray:
    """uint8 [n, size, size, 3]: at most so many frames, evenly spaced over the object. Raises BadData."""
    request = FrameRequest(fps=recipe.tokenize.fps, size=size, chunk=most, max_frames=most)
    chunks = object_frames(found, recipe.storage.options, request, recipe.tokenize.decoder_limits)
    return np.concatenate([chunk.frames for chunk in chunks])


def windows(found: SourceObject, recipe: Recipe, size: int, length: int, most: int) -> list[np.ndarray]:
    """At most so many windows of successive frames, uint8 [length, size, size, 3], from the clip's start on."""
    request = FrameRequest(fps=recipe.tokenize.fps, size=size, chunk=length)
    chunks = object_frames(found, recipe.storage.options, request, recipe.tokenize.decoder_limits)
    return [chunk.frames for chunk in itertools.islice(chunks, most) if len(chunk) == length]


def strip(rows: list[np.ndarray], given: int = 0) -> np.ndarray:
    """RGBA [h, w, 4] of rows of frames uint8 [n, H, W, 3] set side by side with transparent gaps.

    given: so many frames of each row are set apart from the rest by a gap of an eighth of a frame more.
    """
    height, width = rows[0].shape[1:3]
    columns = max(map(len, rows))
    apart = width // 8 if given else 0
    canvas = np.zeros(
        (len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP + apart, 4),
        dtype=np.uint8,
    )
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
