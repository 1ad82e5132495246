"""One partition of the tokenize stage: its objects to a Parquet of documents, in one Ray task; a long video in more.

In: a partition, what every partition needs to know, the pool of encoders. Out: `documents/<partition>.parquet` and the
partition's record with its counts and quarantine. A partition that a dead worker left is simply made again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from pipelines.cluster.same_code import as_driver
from pipelines.dag.partitions import Pieces, record_name
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.documents import to_documents
from pipelines.tokenize.records import Record, Tally, TokenizeJob, encode_objects, media_records, text_records
from pipelines.tokenize.video_pieces import Piece, cut_video, encode_piece, join_pieces, missing
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from storage.store import Store
from storage.urls import fetch_file
from tokenization.document import Document
from tokenization.shards.document_parquet import write_documents
from tokenization.text.tokenizer import load_text_tokenizer

log = logging.getLogger("ringworld")

Result = TypeVar("Result")

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
@as_driver
def tokenize_partition(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    """Commit a partition's documents and return its record; of a long video, first what pieces of it are to be made.

    Raises UserError when its objects cannot be reached.
    """
    return _patiently(part.name, lambda: _tokenized(part, job, pool, store))


@ray.remote
@as_driver
def tokenize_piece(piece: Piece, job: TokenizeJob, pool: Any, store: Store) -> None:
    """Commit a piece of a partition's video. Raises UserError when it cannot be reached."""
    _patiently(piece.name, lambda: encode_piece(piece, job, pool, store))


def _patiently(name: str, work: Callable[[], Result]) -> Result:
    for attempt in range(1, _READ_ATTEMPTS + 1):
        try:
            return work()
        except OSError as error:
            if isinstance(error, StoreError) and error.kind != "transient":  # it says itself what to mend
                raise
            # A store that does not answer says nothing of the data: quarantine would make its mood part of the output.
            if attempt == _READ_ATTEMPTS:
                raise UserError(
                    f"tokenize: {name} cannot be read after {attempt} attempts ({error}); see that the store answers, "
                    f"and run the same command again"
                ) from error
            log.warning("tokenize: %s: %s; trying again", name, error)
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def _tokenized(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    pieces = _pieces(part, job)
    if len(pieces) > 1 and (ahead := missing(pieces, store)):
        return Pieces(tuple(ahead))
    tally = Tally()
    counts = {"documents": 0, "tokens": 0, "vision_tokens": 0}

    def counted(documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            counts["documents"] += 1
            counts["tokens"] += len(document)
            if "vision" in job.vocabulary:
                counts["vision_tokens"] += int(job.vocabulary["vision"].contains(document.tokens).sum())
            yield document

    name = f"documents/{part.name}.parquet"
    tokenizer = load_text_tokenizer(str(fetch_file(job.recipe.text_tokenizer.path, job.recipe.storage.options)))
    records = _records(part, pieces, job, pool, store, tally)
    with store.writing(name) as file:
        write_documents(file, counted(to_documents(records, job, tokenizer, tally)))
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


def _pieces(part: Partition, job: TokenizeJob) -> list[Piece]:
    """Those of a partition that is one video; none of another, nor of a video that cannot be read."""
    (first, *more) = part.objects
    if first.kind != "video" or more:
        return []
    try:
        return cut_video(part.name, first, job)
    except BadData:  # as will be found again where it is put in quarantine
        return []


def _records(
    part: Partition, pieces: list[Piece], job: TokenizeJob, pool: Any, store: Store, tally: Tally
) -> Iterator[Record]:
    if len(pieces) > 1:
        yield from media_records([(part.objects[0], join_pieces(pieces, store))], job, tally)
        return
    samples = pieces[0].samples if pieces else None
    for is_text, objects in itertools.groupby(part.objects, lambda found: found.kind == "text"):
        if is_text:
            yield from itertools.chain.from_iterable(text_records(found, job, tally) for found in objects)
        else:
            yield from media_records(encode_objects(list(objects), job, pool, samples), job, tally)
