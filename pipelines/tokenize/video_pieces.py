"""A long video in pieces cut by time, each encoded by a task of its own on any node, then joined to one medium.

In: a video and how long a piece may be. Out: `pieces/<partition>/<samples>.safetensors` with the codes and times of a
piece, or why it cannot be decoded; and of all of them the same `Encoded` as of the video in one go, wherever it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from pipelines.decoder.client import counted_samples
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, Origin, media_of
from pipelines.tokenize.encode_media import Encoded, join_encoded
from pipelines.tokenize.records import TokenizeJob, encode_objects
from storage.store import Store
from tokenization.media.frame_sampling import Samples, choose_samples

PIECES = "pieces"
_REASON = "bad"


@dataclass(frozen=True)
class Piece:
    """What one task encodes: some samples of a video, which has `total`. identity: as of its `Medium`."""

    partition: str
    video: SourceObject
    samples: Samples
    total: int
    identity: tuple[str, str, str] | None

    @property
    def name(self) -> str:
        """Where it is committed, below its stage's folder; a piece of another cut is committed elsewhere."""
        first, last = self.samples.numbers[[0, -1]]
        return f"{PIECES}/{self.partition}/{first:09d}-{last:09d}.safetensors"

    def __str__(self) -> str:
        return self.name


def cut_video(partition: str, video: SourceObject, job: TokenizeJob) -> list[Piece]:
    """The pieces of a listed video, in order: one pass over its packets, of which none is decoded. Raises BadData."""
    settings = job.recipe.tokenize
    (medium,) = media_of(video, job.recipe.storage.options)
    assert isinstance(medium, Medium)
    total = counted_samples(medium.content, settings.fps, settings.decoder_limits)
    samples = choose_samples(total, job.max_frames(video), medium.part, settings.window)
    pieces = samples.pieces(max(1, int(settings.piece_seconds * settings.fps)))
    return [Piece(partition, video, piece, total, medium.identity) for piece in pieces]


def encode_piece(piece: Piece, job: TokenizeJob, pool: Any, store: Store) -> None:
    """Commit the codes of a piece, or why it has none."""
    ((_, outcome),) = encode_objects([piece.video], job, pool, piece.samples)
    if isinstance(outcome, BadMedium):
        tensors = {_REASON: np.frombuffer(outcome.reason.encode(), np.uint8)}
    else:
        encoder = np.frombuffer(outcome.encoder.encode(), np.uint8)
        tensors = {"codes": outcome.codes, "times": outcome.times, "encoder": encoder}
    with store.writing(piece.name) as file:
        file.write(save(tensors))


def missing(pieces: Sequence[Piece], store: Store) -> list[Piece]:
    """Those that are not committed yet."""
    done = set(store.names(f"{PIECES}/{pieces[0].partition}"))
    return [piece for piece in pieces if piece.name not in done]


def join_pieces(pieces: Sequence[Piece], store: Store) -> Encoded | BadMedium:
    """The whole video, once all its pieces are committed; bad with the reason of the first piece that is."""
    video = pieces[0].video
    origin = Origin(video.key, None, video.side)
    codes, times, encoders = [], [], []
    for piece in pieces:
        with store.open(piece.name) as file:
            tensors = load(file.read())
        if _REASON in tensors:
            return BadMedium(origin, tensors[_REASON].tobytes().decode())
        codes.append(tensors["codes"])
        times.append(tensors["times"])
        encoders.append(tensors["encoder"].tobytes().decode())
    return join_encoded(origin, codes, times, encoders, total=pieces[0].total, identity=pieces[0].identity)
