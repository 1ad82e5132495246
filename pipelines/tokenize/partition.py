"""One partition of the tokenize stage: its objects to a Parquet of documents, in one Ray task.

In: a partition, what every partition needs to know, the encoders. Out: `documents/<partition>.parquet` and the
partition's record with its counts and quarantine. A partition that a dead worker left is simply made again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.partitions import record_name
from pipelines.sources import SourceObject
from pipelines.storage import Store
from pipelines.tokenize.records import Record, Tally, TokenizeJob, media_records, text_records
from pipelines.tokenize.to_documents import to_documents
from pipelines.urls import fetch_file
from tokenization.document import Document
from tokenization.documents import write_documents
from tokenization.errors import UserError
from tokenization.text import load_text_tokenizer

log = logging.getLogger("ringworld")

_READ_ATTEMPTS = 4
_ALONE = ("video", "records")  # their bytes do not say how much work they are


@dataclass(frozen=True)
class Partition:
    """One unit of work: the objects of one source and split, in order."""

    name: str
    source: str
    heldout: bool
    objects: tuple[SourceObject, ...]


def cut_partitions(objects: Sequence[SourceObject], partition_bytes: int) -> list[Partition]:
    """Partitions of a listing: `_ALONE` each of their own, the rest grouped by bytes. Independent of the cluster."""
    partitions: list[Partition] = []
    group: list[SourceObject] = []

    def close() -> None:
        if group:
            first = group[0]
            split = "heldout" if first.heldout else "train"
            number = sum(part.source == first.source and part.heldout == first.heldout for part in partitions)
            name = f"{first.source}-{split}-{number:06d}"
            partitions.append(Partition(name, first.source, first.heldout, tuple(group)))
            group.clear()

    for found in sorted(objects, key=lambda o: (o.source, o.heldout, o.key)):
        if group and (
            (group[0].source, group[0].heldout) != (found.source, found.heldout)
            or found.kind in _ALONE
            or group[-1].kind in _ALONE
            or sum(o.size for o in group) + found.size > partition_bytes
        ):
            close()
        group.append(found)
    close()
    return partitions


@ray.remote
def tokenize_partition(part: Partition, job: TokenizeJob, encoders: list[Any], store: Store) -> dict[str, Any]:
    """Commit a partition's documents and return its record. UserError when its objects cannot be reached."""
    for attempt in range(1, _READ_ATTEMPTS + 1):
        try:
            return _tokenized(part, job, encoders, store)
        except OSError as error:
            # A store that does not answer says nothing of the data: quarantine would make its mood part of the output.
            if attempt == _READ_ATTEMPTS:
                raise UserError(
                    f"tokenize: {part.name} cannot be read after {attempt} attempts ({error}); see that the store "
                    f"answers, and run the same command again"
                ) from error
            log.warning("tokenize: %s: %s; trying again", part.name, error)
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def _tokenized(part: Partition, job: TokenizeJob, encoders: list[Any], store: Store) -> dict[str, Any]:
    tally = Tally()
    counts = {"documents": 0, "tokens": 0, "vision_tokens": 0}

    def counted(documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            counts["documents"] += 1
            counts["tokens"] += len(document)
            counts["vision_tokens"] += int(job.vocabulary.is_vision(document.tokens).sum())
            yield document

    name = f"documents/{part.name}.parquet"
    with store.writing(name) as file:
        write_documents(file, counted(_documents(part, job, encoders, tally)))
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "partition": part.name,
        "source": part.source,
        "heldout": part.heldout,
        "file": name,
        "sha256": sha256,
        "units": tally.units,
        "frames": tally.frames,
        "quarantine": tally.quarantine,
        **counts,
    }
    store.write_json(record_name(part.name), record)
    return record


def _documents(part: Partition, job: TokenizeJob, encoders: list[Any], tally: Tally) -> Iterator[Document]:
    tokenizer = load_text_tokenizer(str(fetch_file(job.recipe.text_tokenizer.path, job.recipe.storage.options)))
    records: Iterator[Record]
    for is_text, objects in itertools.groupby(part.objects, lambda found: found.kind == "text"):
        if is_text:
            records = itertools.chain.from_iterable(text_records(found, job, tally) for found in objects)
        else:
            records = media_records(list(objects), job, encoders, tally)
        yield from to_documents(records, job, tokenizer, tally)
