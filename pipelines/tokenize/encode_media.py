"""Frames to codes by a pool of encoders, many small media to a batch.

In: media, whose frames are decoded a chunk at a time. Out: their codes, which do not depend on the batches. Besides the
batch that it fills, a decode task has no more than a given number of bytes of frames in flight.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from pipelines.cluster.placement import PlacementWait
from pipelines.cluster.progress import Meter
from pipelines.cluster.same_code import as_driver
from pipelines.recipe import EncoderResources, VisualTokenizer
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, Origin
from pipelines.tokenize.encoder_pool import encoder_pool
from storage.errors import BadData
from storage.store import Store
from tokenization.media.frame_sampling import FrameChunk

if TYPE_CHECKING:
    from tokenization.codecs.vqgan.model import VQGAN


def vqgan_pool(recipe: VisualTokenizer, weights: Store, resources: EncoderResources) -> AbstractContextManager[Any]:
    """A pool of VQGANs, each on one device, with the resources of the recipe."""
    actor = _Encoder.options(**resources.ray_options)  # type: ignore[attr-defined]
    return encoder_pool(actor, (recipe, weights), resources, PlacementWait("tokenize.encode", resources))


@ray.remote
class _Encoder:
    """One VQGAN on one device."""

    def __init__(self, recipe: VisualTokenizer, weights: Store) -> None:
        self._recipe, self._weights = recipe, weights
        self._vqgan: VQGAN | None = None
        self._meter = Meter("tokenize")
        self._frames = 0
        self._about = ""

    @as_driver
    def load(self) -> None:
        """Read the weights. A UserError would not reach the caller from the constructor."""
        import torch  # half a GiB that decode tasks and the pool do without

        from pipelines.codecs.vqgan import load_vqgan

        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._about = f"{_processor(device)}, {self._recipe.precision}, torch {torch.__version__}"
        self._vqgan = load_vqgan(self._weights, self._recipe, device=device, encoder_only=True)

    def encode(self, frames: np.ndarray) -> tuple[np.ndarray, str]:
        """Codes int32 [n, codes of a frame], and what made them: device, precision, versions."""
        assert self._vqgan is not None, "load() comes first"
        codes = self._vqgan.encode(frames)
        self._frames += len(frames)
        self._meter.set(frames_encoded=self._frames)
        return codes, self._about


def _processor(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"


@dataclass
class Encoded:
    """A medium's codes int32 [n, codes] and times float64 [n] of its sampled frames; n may be 0.

    total: samples of the whole video, if they were counted. encoder: what made the codes; of several, all of them.
    identity: as of `Medium`, where the codes are new and can be kept; None where they were found.
    """

    origin: Origin
    codes: np.ndarray
    times: np.ndarray
    total: int | None = None
    encoder: str = ""
    identity: tuple[str, str, str] | None = None


def join_encoded(
    origin: Origin, codes: Sequence[np.ndarray], times: Sequence[np.ndarray], encoders: Iterable[str], **facts: Any
) -> Encoded:
    """A medium of the codes and times of its consecutive parts, some or all of which may be empty."""
    parts = [part for part in codes if len(part)] or [np.zeros((0, 0), np.int32)]
    encoder = "; ".join(sorted(set(encoders)))
    return Encoded(origin, np.concatenate(parts), np.concatenate([np.zeros(0), *times]), encoder=encoder, **facts)


def encode_media(
    media: Iterable[tuple[SourceObject, Medium | Encoded | BadMedium]],
    frames_of: Callable[[SourceObject, Medium], Iterator[FrameChunk]],
    pool: Any,
    batch: int,
    in_flight: int,
) -> Iterator[tuple[SourceObject, Encoded | BadMedium]]:
    """Encode media, `batch` frames at a time, whichever media they are from; the outcomes in the media's order.

    in_flight: bytes of frames at most, but at least one batch. A medium whose frames raise BadData becomes a BadMedium;
    one that has been encoded already stays as it is.
    """
    batches = _Batches(pool, batch, in_flight)
    waiting: deque[tuple[SourceObject, _Pending]] = deque()
    for found, medium in media:
        waiting.append((found, pending := _Pending(medium.origin)))
        if isinstance(medium, BadMedium | Encoded):
            pending.outcome = medium
        else:
            pending.identity = medium.identity
            try:
                for chunk in frames_of(found, medium):
                    pending.times.append(chunk.times)
                    pending.total = chunk.total
                    batches.add(pending, chunk.frames)
            except BadData as error:
                pending.outcome = BadMedium(medium.origin, str(error))
        while waiting and (waiting[0][1].outcome or not waiting[0][1].missing):
            yield _finished(*waiting.popleft())
    batches.finish()
    yield from (_finished(found, pending) for found, pending in waiting)


@dataclass
class _Pending:
    """A medium of which some frames are still being encoded. It keeps no frames."""

    origin: Origin
    codes: list[np.ndarray] = field(default_factory=list)
    times: list[np.ndarray] = field(default_factory=list)
    encoders: set[str] = field(default_factory=set)
    missing: int = 0
    total: int | None = None
    identity: tuple[str, str, str] | None = None
    outcome: Encoded | BadMedium | None = None


def _finished(found: SourceObject, pending: _Pending) -> tuple[SourceObject, Encoded | BadMedium]:
    if pending.outcome:
        return found, pending.outcome
    facts = {"total": pending.total, "identity": pending.identity}
    return found, join_encoded(pending.origin, pending.codes, pending.times, pending.encoders, **facts)


class _Batches:
    """Frames on their way to the encoders and their codes on the way back."""

    def __init__(self, pool: Any, size: int, in_flight: int) -> None:
        self._pool, self._size, self._in_flight = pool, size, in_flight
        self._filling: list[tuple[_Pending, np.ndarray]] = []
        self._room = size
        self._sent: deque[_Batch] = deque()
        self._bytes = 0

    def add(self, pending: _Pending, frames: np.ndarray) -> None:
        """Send frames [n, H, W, 3] with those before them, as soon as they fill a batch."""
        pending.missing += len(frames)
        while len(frames):
            piece, frames = frames[: self._room], frames[self._room :]
            self._filling.append((pending, piece))
            self._room -= len(piece)
            if not self._room:
                self._send()

    def finish(self) -> None:
        """Send the rest and wait for all codes."""
        if self._filling:
            self._send()
        while self._sent:
            self._receive()

    def _send(self) -> None:
        pieces = [piece for _, piece in self._filling]
        frames = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        owners = [(owner, len(piece)) for owner, piece in self._filling]
        while self._sent and self._bytes + frames.nbytes > self._in_flight:
            self._receive()
        stored = ray.put(frames)
        media = ", ".join(dict.fromkeys(owner.origin.key for owner, _ in owners))
        self._sent.append(_Batch(self._pool.encode.remote([stored], media), stored, frames.nbytes, owners))
        self._bytes += frames.nbytes
        self._filling, self._room = [], self._size

    def _receive(self) -> None:
        batch = self._sent.popleft()
        codes, encoder = ray.get(batch.codes)
        self._bytes -= batch.nbytes
        for owner, count in batch.owners:
            owner.encoders.add(encoder)
            owner.codes.append(codes[:count])
            owner.missing -= count
            codes = codes[count:]


@dataclass(frozen=True)
class _Batch:
    """Frames in flight. frames: kept for another encoder if one dies. owners: the media they are of, and how many."""

    codes: ray.ObjectRef
    frames: ray.ObjectRef
    nbytes: int
    owners: list[tuple[_Pending, int]]
