"""From the objects of a partition to its documents: records of text, and of media with their codes, by field specs.

In: listed objects, and a pool of encoders. Out: records, and their documents with their provenance, in order. What
cannot be used goes to the tally's quarantine.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipelines.decoder.client import parsed_records
from pipelines.recipe import Recipe
from pipelines.sources.listing import SourceObject, content_of
from pipelines.sources.media import BadMedium, Medium, Origin, media_of, medium_frames
from pipelines.tokenize.codes.codes import Codes
from pipelines.tokenize.codes.place import CodesPlace
from pipelines.tokenize.encode_media import Encoded, encode_media
from storage.errors import BadData
from storage.public_url import object_url
from tokenization.document import Document
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens, field_names, spec_for_record
from tokenization.media.frame_sampling import FrameChunk, FrameRequest, Samples, choose_samples, document_frames
from tokenization.media.turns import Turn, turned
from tokenization.readers.record import BadRecord
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary


@dataclass(frozen=True)
class TokenizeJob:
    """What all partitions share. codes: where the codes of media are found and kept, if anywhere."""

    recipe: Recipe
    vocabulary: JointVocabulary
    resolution: int
    codes: CodesPlace | None = None

    def max_frames(self, found: SourceObject) -> int | None:
        """The most frames of one medium of this object, None for all."""
        return self.recipe.max_frames(found.source)

    def turns(self, found: SourceObject) -> Sequence[Turn]:
        """How this object is turned, for further documents: only videos are, and only to be trained on."""
        trains_on_video = found.kind == "video" and not found.heldout
        return (self.recipe.sources[found.source].turns or ()) if trains_on_video else ()

    def columns(self, found: SourceObject) -> list[str]:
        """The fields of this object's records that become tokens; of media, `vision` is the medium itself."""
        names = field_names(self.recipe.sources[found.source].fields)
        return [name for name in names if found.kind == "text" or "vision" not in name]


@dataclass
class Tally:
    """Counts of one partition, filled in as it runs. thinned_videos: of which `frames_left_out` were left out."""

    units: int = 0
    frames: int = 0
    thinned_videos: int = 0
    frames_left_out: int = 0
    documents: int = 0
    tokens: int = 0
    vision_tokens: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    inner_heldout: dict[str, int] = field(default_factory=dict)
    """How many of its tars' samples and of its records each glob holds out."""

    def thinned(self, encoded: Encoded, fps: float) -> None:
        """Count what the largest number of frames has left out between a medium's first sample and its last."""
        numbers = np.rint(encoded.times * fps).astype(np.int64)
        left_out = int(numbers[-1] - numbers[0]) + 1 - len(numbers)
        self.thinned_videos += left_out > 0
        self.frames_left_out += left_out

    def bad(self, found: SourceObject, reason: str, record: int | None = None, key: str | None = None) -> None:
        """Put an object, or one record of it (with a key of its own, if it has one), in quarantine."""
        self.quarantine.append({"url": found.url, "key": key or found.key, "record": record, "reason": reason})


@dataclass(slots=True)  # not frozen, which takes a microsecond for each of many
class Record:
    """What becomes one document. unit: the key of the text or medium that it is from; start: its first line or frame in
    that. number: of the record in its object. fields: by name, for a field spec.
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
        return record_key(self.unit, self.start)


def record_key(unit: str, start: int | str) -> str:
    """The key of the document that begins at a line or frame of a text or medium."""
    return f"{unit}#{start}"


def text_records(found: SourceObject, job: TokenizeJob, tally: Tally) -> Iterator[Record]:
    """Records of a text object; a bad one is left out."""
    try:
        content = content_of(found, job.recipe.storage.options)
        for record in parsed_records(content, found.url, job.columns(found), job.recipe.tokenize.decoder_limits):
            tally.units += 1
            if isinstance(record, BadRecord):
                tally.bad(found, record.reason, record.index)
            else:
                yield Record(found, found.key, record[0], *record)
    except BadData as error:
        tally.units += 1
        tally.bad(found, str(error))


def encode_objects(
    objects: Sequence[SourceObject],
    job: TokenizeJob,
    pool: Any,
    samples: Samples | None = None,
    total: int | None = None,
    codes: Codes | None = None,
    turn: Turn | None = None,
) -> Iterator[tuple[SourceObject, Encoded | BadMedium]]:
    """The media of objects with their codes, in order; small media of any objects share a batch.

    samples: of an object that is one video, which has `total`, those to take, if they have been chosen already. codes:
    where those of a medium may be found, and are kept that are made. turn: how every frame is turned first, which makes
    another medium of it. Raises `OvertakenError` as that does.
    """
    settings = job.recipe.tokenize
    request = FrameRequest(
        fps=settings.fps,
        size=job.resolution,
        chunk=settings.chunk_frames,
        window=settings.window,
        samples=samples,
    )

    def frames(found: SourceObject, medium: Medium) -> Iterator[FrameChunk]:
        for chunk in medium_frames(medium, replace(request, max_frames=job.max_frames(found)), settings.decoder_limits):
            yield replace(chunk, frames=turned(chunk.frames, turn)) if turn else chunk

    def media() -> Iterator[tuple[SourceObject, Medium | Encoded | BadMedium]]:
        for found in objects:
            for medium in media_of(found, job.recipe.storage.options, job.columns(found), settings.decoder_limits):
                medium = turned_medium(medium, turn) if turn else medium
                yield found, (codes and find_codes(found, medium, job, codes)) or medium

    in_flight = settings.in_flight_mib * 2**20
    for found, outcome in encode_media(media(), frames, pool, settings.chunk_frames, in_flight):
        if codes:
            keep_codes(outcome, codes, settings.fps, total)
        yield found, outcome


def turned_medium(medium: Medium | BadMedium, turn: Turn) -> Medium | BadMedium:
    """The medium whose frames are turned: its documents have other keys, and its codes are kept beside the others."""
    origin = replace(medium.origin, key=f"{medium.origin.key}~{turn}")
    if isinstance(medium, BadMedium) or medium.identity is None:
        return replace(medium, origin=origin)
    url, etag, member = medium.identity
    return replace(medium, origin=origin, identity=(url, etag, f"{member}~{turn}"))


def find_codes(found: SourceObject, medium: Medium | BadMedium, job: TokenizeJob, codes: Codes) -> Encoded | None:
    """A medium as it was encoded before, or None."""
    if isinstance(medium, BadMedium) or medium.identity is None:
        return None
    share = (job.max_frames(found), medium.part, job.recipe.tokenize.window)
    kept = codes.find(medium.identity, lambda total: choose_samples(total, *share).numbers)
    return Encoded(medium.origin, kept.codes, kept.times) if kept else None


def keep_codes(encoded: Encoded | BadMedium, codes: Codes, fps: float, total: int | None = None) -> None:
    """Add what has just been encoded to the codes. total: of a video whose samples were chosen before."""
    if isinstance(encoded, BadMedium) or encoded.identity is None or not len(encoded.codes):
        return
    numbers = np.rint(encoded.times * fps).astype(np.int64)
    total = encoded.total or total or int(numbers[-1]) + 1  # of a medium of which every sample was taken
    codes.add(encoded.identity, total, numbers, encoded.times, encoded.codes, encoded.encoder)


def media_records(
    media: Iterable[tuple[SourceObject, Encoded | BadMedium]], job: TokenizeJob, tally: Tally
) -> Iterator[Record]:
    """Records of encoded media, one each `frames_per_document` frames; none of a medium that is not wholly readable."""
    for found, outcome in media:
        for glob in _globs_that_hold_out(found, outcome.origin):
            tally.inner_heldout[glob] = tally.inner_heldout.get(glob, 0) + 1
        if isinstance(outcome, Encoded) and not len(outcome.codes):
            if found.part != (0.0, 1.0):  # of a video with so few frames, all are in its other part
                continue
            outcome = BadMedium(outcome.origin, "no frame in it")
        if isinstance(outcome, BadMedium):
            tally.units += 1
            tally.bad(found, outcome.reason, outcome.origin.number, outcome.origin.key)
            continue
        origin, codes = outcome.origin, outcome.codes
        tally.frames += len(codes)
        tally.thinned(outcome, job.recipe.tokenize.fps)
        part = {"part": list(found.part)} if found.part != (0.0, 1.0) else {}
        size = job.recipe.tokenize.frames_per_document or len(codes)
        for frames in document_frames(len(codes), size, job.recipe.tokenize.frame_step or 1):
            tally.units += 1
            start = int(frames[0])
            number = start if origin.number is None else origin.number
            times = [round(float(time), 6) for time in outcome.times[frames]]
            fields = {**origin.side, "vision": codes[frames]}
            yield Record(found, origin.key, start, number, fields, {**origin.provenance, **part, "frame_times": times})


def _globs_that_hold_out(found: SourceObject, origin: Origin) -> list[str]:
    if not found.heldout:
        return []
    names = [origin.key, f"{found.url}{origin.key.removeprefix(found.key)}"]
    names += [medium["url"], object_url(medium["url"])] if (medium := origin.provenance.get("media")) else []
    return [glob for glob in found.inner_heldout if any(fnmatch.fnmatch(name, glob) for name in names)]


def to_documents(
    records: Iterable[Record], job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[Document]:
    """Each record as a document; provenance names its object, its number in there, its field spec and its frames."""
    for record in records:
        found = record.found
        try:
            spec = fitting_spec(record, job)
            tokens, spans = build_tokens(record.fields, spec, tokenizer, job.vocabulary)
        except BadData as error:
            tally.bad(found, str(error), record.number, record.unit)
            continue
        provenance = {"url": found.url, "etag": found.etag, "record": record.number, "fields": spec.text}
        if spec.has_vision:
            provenance |= _streams(tokens, job.vocabulary)
        provenance |= record.provenance
        tally.documents += 1
        tally.tokens += len(tokens)
        if "vision" in job.vocabulary:
            tally.vision_tokens += int(job.vocabulary["vision"].contains(tokens).sum())
        yield Document(record.key, found.source, tokens, spans, provenance)


def fitting_spec(record: Record, job: TokenizeJob) -> FieldSpec:
    """One of the source's specs that the record's fields fit, by its key. Raises BadData where none fits."""
    specs = job.recipe.sources[record.found.source].fields
    if len(specs) == 1:
        only = spec_for_record(specs[0], 0)
        only.check(record.fields)
        return only
    fitting, problems = [], {}
    for text in specs:
        try:
            spec_for_record(text, 0).check(record.fields)
            fitting.append(text)
        except BadData as error:
            problems[text] = str(error)
    if not fitting:
        each = "; ".join(f"{text}: {problem}" for text, problem in problems.items())
        raise BadData(f"none of its field specs fits: {each}")
    return draw_spec(fitting, record.key, job)


def draw_spec(fitting: Sequence[str], key: str, job: TokenizeJob) -> FieldSpec:
    """One of the specs that a record fits, by the key of its document."""
    draw = hashlib.sha256(f"{job.recipe.seed}/{key}".encode()).digest()[:8]
    return spec_for_record(fitting, int.from_bytes(draw, "big"))


def _streams(tokens: np.ndarray, vocabulary: JointVocabulary) -> dict[str, Any]:
    """Where a document's frames are in its tokens, so that the frames of a piece of it have their numbers."""
    edges = np.flatnonzero(np.diff(vocabulary["vision"].contains(tokens), prepend=False, append=False))
    ends = np.isin(tokens, (vocabulary.eof_id, vocabulary.eov_id))
    streams = [
        {"start": int(start), "end": int(end), "frames": int(ends[start:end].sum())}
        for start, end in zip(edges[::2], edges[1::2])
    ]
    return {"vision": streams} if streams else {}
