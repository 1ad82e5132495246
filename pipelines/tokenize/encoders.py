"""Frames to codes on a pool of encoder actors.

In: the frames of a video or image, decoded a chunk at a time. Out: its codes. At most two chunks of a decode task are
under way, whatever the length of the video.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

import numpy as np
import ray

from pipelines.frames import object_frames
from pipelines.progress import Meter
from pipelines.recipe import Recipe, Resources, VisualTokenizer
from pipelines.sources import SourceObject
from pipelines.storage import Store
from pipelines.vqgan import load_vqgan

_CHUNKS_IN_FLIGHT = 2  # per decode task: one being encoded, one waiting


def start_encoders(recipe: VisualTokenizer, weights: Store, pool: Resources) -> list[Any]:
    """The pool of encoder actors. A dead one is restarted by Ray and its calls are repeated."""
    actor = _Encoder.options(  # type: ignore[attr-defined]
        max_restarts=-1, max_task_retries=-1, **pool.ray_options
    )
    return [actor.remote(recipe, weights) for _ in range(pool.workers)]


@ray.remote
class _Encoder:
    """One VQGAN on one device."""

    def __init__(self, recipe: VisualTokenizer, weights: Store) -> None:
        import torch

        torch.set_num_threads(1)
        self._vqgan = load_vqgan(weights, recipe, device="cuda" if torch.cuda.is_available() else "cpu")
        self._meter = Meter("tokenize")
        self._frames = 0

    def encode(self, frames: np.ndarray) -> np.ndarray:
        codes = self._vqgan.encode(frames)
        self._frames += len(frames)
        self._meter.set(frames_encoded=self._frames)
        return codes


def encode_object(found: SourceObject, recipe: Recipe, size: int, encoders: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [n, codes] and times float64 [n] of all sampled frames; the frames are held a chunk at a time."""
    settings = recipe.tokenize
    waiting: deque[ray.ObjectRef] = deque()
    codes: list[np.ndarray] = []
    times: list[np.ndarray] = []
    chunks = object_frames(
        found,
        recipe.storage.options,
        fps=settings.fps,
        size=size,
        chunk=settings.chunk_frames,
        max_frames=recipe.sources[found.source].max_frames or settings.max_frames,
    )
    first = zlib.crc32(found.key.encode())  # short objects begin at different encoders
    for number, chunk in enumerate(chunks, first):
        if len(waiting) == _CHUNKS_IN_FLIGHT:
            codes.append(ray.get(waiting.popleft()))
        waiting.append(encoders[number % len(encoders)].encode.remote(chunk.frames))
        times.append(chunk.times)
    codes += [ray.get(reference) for reference in waiting]
    return np.concatenate(codes), np.concatenate(times)
