"""What the objects of a partition hold: records of text, and of media with their codes.

In: listed objects, and a pool of encoders. Out: records one by one, ready for their field spec. What cannot be used
goes to the tally's quarantine and costs itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.recipe import Recipe
from pipelines.sources.frames import medium_frames
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, media_of
from pipelines.tokenize.encode_media import Encoded, encode_media
from storage.errors import BadData
from storage.urls import open_url
from tokenization.media.frame_sampling import FrameRequest, Samples
from tokenization.media.video import FrameChunk
from tokenization.readers.records import BadRecord, read_records
from tokenization.vocabulary import JointVocabulary


@dataclass(frozen=True)
class TokenizeJob:
    """What every partition needs to know, and nothing that changes with the cluster."""

    recipe: Recipe
    vocabulary: JointVocabulary
    resolution: int

    def max_frames(self, found: SourceObject) -> int:
        """Frames that a medium of this object has at most."""
        return self.recipe.sources[found.source].max_frames or self.recipe.tokenize.max_frames


@dataclass
class Tally:
    """Counts of one partition, filled in as it runs."""

    units: int = 0
    frames: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def bad(self, found: SourceObject, reason: str, record: int | None = None, key: str | None = None) -> None:
        """Put an object, or one record of it (with a key of its own, if it has one), in quarantine."""
        self.quarantine.append({"url": found.url, "key": key or found.key, "record": record, "reason": reason})


@dataclass(frozen=True)
class Record:
    """What becomes one document. unit: the key of what it is from, to which `start` (its number in there: a line, a
    frame) is added. number: of the record in its object. fields: by name, for a field spec.
    """

    found: SourceObject
    unit: str
    start: int
    number: int
    fields: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The document's key."""
        return f"{self.unit}#{self.start}"


def text_records(found: SourceObject, job: TokenizeJob, tally: Tally) -> Iterator[Record]:
    """Records of a text object; a bad one is left out."""
    try:
        with open_url(found.url, job.recipe.storage.options) as file:
            for record in read_records(file, found.url):
                tally.units += 1
                if isinstance(record, BadRecord):
                    tally.bad(found, record.reason, record.index)
                elif record[1] == {"text": ""}:
                    tally.bad(found, "the text is empty", record[0])
                else:
                    yield Record(found, found.key, record[0], *record)
    except BadData as error:
        tally.units += 1
        tally.bad(found, str(error))


def encode_objects(
    objects: Sequence[SourceObject], job: TokenizeJob, pool: Any, samples: Samples | None = None
) -> Iterator[tuple[SourceObject, Encoded | BadMedium]]:
    """The media of objects with their codes, in order; many small ones share a batch, whichever object they are from.

    samples: of an object that is one video, what to take of it, if that has been chosen already.
    """
    settings = job.recipe.tokenize
    request = FrameRequest(fps=settings.fps, size=job.resolution, chunk=settings.chunk_frames, samples=samples)

    def frames(found: SourceObject, medium: Medium) -> Iterator[FrameChunk]:
        return medium_frames(medium, replace(request, max_frames=job.max_frames(found)), settings.decoder_limits)

    media = ((found, medium) for found in objects for medium in media_of(found, job.recipe.storage.options))
    yield from encode_media(media, frames, pool, settings.chunk_frames, settings.in_flight_mib * 2**20)


def media_records(
    media: Iterable[tuple[SourceObject, Encoded | BadMedium]], job: TokenizeJob, tally: Tally
) -> Iterator[Record]:
    """Records of encoded media, one each `frames_per_document` frames; none of a medium that is not wholly readable."""
    for found, outcome in media:
        if isinstance(outcome, Encoded) and not len(outcome.codes):
            outcome = BadMedium(outcome.origin, "no frame in it")
        if isinstance(outcome, BadMedium):
            tally.units += 1
            tally.bad(found, outcome.reason, outcome.origin.number, outcome.origin.key)
            continue
        yield from _windows(found, outcome, job.recipe.tokenize.frames_per_document, tally)


def _windows(found: SourceObject, encoded: Encoded, length: int | None, tally: Tally) -> Iterator[Record]:
    origin, codes = encoded.origin, encoded.codes
    tally.frames += len(codes)
    part = {"part": list(found.part)} if found.part != (0.0, 1.0) else {}
    size = length or len(codes)
    for start in range(0, len(codes), size):
        tally.units += 1
        window = slice(start, start + size)
        times = [round(float(t), 6) for t in encoded.times[window]]
        yield Record(
            found,
            origin.key,
            start,
            start if origin.number is None else origin.number,
            {**origin.side, "vision": codes[window]},
            {**origin.provenance, **part, "frame_times": times},
        )
