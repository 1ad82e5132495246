"""Frames to codes on a pool of encoder actors, many small media to a batch.

In: media, whose frames are decoded a chunk at a time. Out: their codes. At most two batches of a decode task are under
way and one is filled, whatever the length of a video and the number of images. A frame's codes do not depend on the
batch that it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from pipelines.media import BadMedium, Medium, Origin
from pipelines.progress import Meter
from pipelines.recipe import Resources, VisualTokenizer
from pipelines.sources import SourceObject
from pipelines.storage import Store
from pipelines.vqgan import load_vqgan
from tokenization.errors import BadData
from tokenization.video import FrameChunk

_BATCHES_UNDER_WAY = 2  # per decode task: one being encoded, one waiting


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


@dataclass
class Encoded:
    """A medium's codes int32 [n, codes] and times float64 [n] of its sampled frames."""

    origin: Origin
    codes: np.ndarray
    times: np.ndarray


def encode_media(
    media: Iterable[tuple[SourceObject, Medium | BadMedium]],
    frames_of: Callable[[SourceObject, Medium], Iterator[FrameChunk]],
    encoders: list[Any],
    batch: int,
    first: int = 0,
) -> Iterator[tuple[SourceObject, Encoded | BadMedium]]:
    """Encode media, `batch` frames at a time, whichever media they are from; the outcomes in the media's order.

    Frames are held as they fill a batch and while at most two batches are under way. first: the encoder to begin with.
    A medium whose frames raise BadData comes out as a BadMedium.
    """
    batches = _Batches(encoders, batch, first)
    waiting: deque[tuple[SourceObject, _Pending | BadMedium]] = deque()
    for found, medium in media:
        waiting.append((found, medium if isinstance(medium, BadMedium) else _read(found, medium, frames_of, batches)))
        while waiting and _is_ready(waiting[0][1]):
            yield _finished(*waiting.popleft())
    batches.finish()
    for found, outcome in waiting:
        yield _finished(found, outcome)


@dataclass
class _Pending:
    """A medium of which some frames are still being encoded; it holds no frames."""

    origin: Origin
    codes: list[np.ndarray] = field(default_factory=list)
    times: list[np.ndarray] = field(default_factory=list)
    missing: int = 0


def _read(
    found: SourceObject,
    medium: Medium,
    frames_of: Callable[[SourceObject, Medium], Iterator[FrameChunk]],
    batches: _Batches,
) -> _Pending | BadMedium:
    pending = _Pending(medium.origin)
    try:
        for chunk in frames_of(found, medium):
            pending.times.append(chunk.times)
            batches.add(pending, chunk.frames)
    except BadData as error:
        return BadMedium(medium.origin, str(error))
    return pending if pending.times else BadMedium(medium.origin, "no frame in it")


def _is_ready(outcome: _Pending | BadMedium) -> bool:
    return isinstance(outcome, BadMedium) or not outcome.missing


def _finished(found: SourceObject, outcome: _Pending | BadMedium) -> tuple[SourceObject, Encoded | BadMedium]:
    if isinstance(outcome, BadMedium):
        return found, outcome
    return found, Encoded(outcome.origin, np.concatenate(outcome.codes), np.concatenate(outcome.times))


class _Batches:
    """Frames on their way to the encoders and their codes on the way back."""

    def __init__(self, encoders: list[Any], size: int, first: int) -> None:
        self._encoders, self._size, self._next = encoders, size, first
        self._filling: list[tuple[_Pending, np.ndarray]] = []
        self._room = size
        self._under_way: deque[tuple[ray.ObjectRef, list[tuple[_Pending, int]]]] = deque()

    def add(self, pending: _Pending, frames: np.ndarray) -> None:
        """Send frames [n, H, W, 3] on with those before them, as soon as they fill a batch."""
        pending.missing += len(frames)
        while len(frames):
            piece, frames = frames[: self._room], frames[self._room :]
            self._filling.append((pending, piece))
            self._room -= len(piece)
            if not self._room:
                self._send()

    def finish(self) -> None:
        """Send what is left and wait for all codes."""
        if self._filling:
            self._send()
        while self._under_way:
            self._receive()

    def _send(self) -> None:
        if len(self._under_way) == _BATCHES_UNDER_WAY:
            self._receive()
        pieces = [piece for _, piece in self._filling]
        frames = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        encoder = self._encoders[self._next % len(self._encoders)]
        self._under_way.append((encoder.encode.remote(frames), [(owner, len(piece)) for owner, piece in self._filling]))
        self._filling, self._room, self._next = [], self._size, self._next + 1

    def _receive(self) -> None:
        reference, owners = self._under_way.popleft()
        codes = ray.get(reference)
        for owner, count in owners:
            owner.codes.append(codes[:count])
            owner.missing -= count
            codes = codes[count:]
