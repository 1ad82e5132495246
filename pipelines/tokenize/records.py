"""What the objects of a partition hold: records of text, and of media with their codes.

In: listed objects. Out: records one by one, ready for their field spec. What cannot be used goes to the tally's
quarantine and costs itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.recipe import Recipe
from pipelines.sources import SourceObject
from pipelines.tokenize.encoders import encode_object
from pipelines.urls import open_url
from tokenization.errors import BadData
from tokenization.records import BadRecord, read_records
from tokenization.vocabulary import JointVocabulary

Record = tuple[int, dict[str, Any], dict[str, Any]]
"""Its number in its object, its fields, and its provenance beyond the object's."""


@dataclass(frozen=True)
class TokenizeJob:
    """What every partition needs to know, and nothing that changes with the cluster."""

    recipe: Recipe
    vocabulary: JointVocabulary
    resolution: int


@dataclass
class Tally:
    """Counts of one partition, filled in as it runs."""

    units: int = 0
    frames: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def bad(self, found: SourceObject, reason: str, record: int | None = None) -> None:
        """Put an object, or one record of it, in quarantine."""
        self.quarantine.append({"url": found.url, "key": found.key, "record": record, "reason": reason})


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
                    yield record[0], record[1], {}
    except BadData as error:
        tally.units += 1
        tally.bad(found, str(error))


def media_records(found: SourceObject, job: TokenizeJob, encoders: list[Any], tally: Tally) -> Iterator[Record]:
    """Records of a video or image, one each `frames_per_document` frames; none at all if any of it is unreadable."""
    try:
        codes, times = encode_object(found, job.recipe, job.resolution, encoders)
    except BadData as error:
        tally.units += 1
        tally.bad(found, str(error))
        return
    tally.frames += len(codes)
    size = job.recipe.tokenize.frames_per_document or len(codes)
    for start in range(0, len(codes), size):
        tally.units += 1
        window = slice(start, start + size)
        yield (
            start,
            {**found.side, "vision": codes[window]},
            {"frame_times": [round(float(t), 6) for t in times[window]]},
        )
