"""One partition of the tokenize stage: its objects to a Parquet of documents, in one Ray task; a long video in more.

In: a partition, what all partitions share, the pool of encoders. Out: `documents/<partition>.parquet` and the
partition's record with its counts and quarantine. A partition that a dead worker left is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray

from pipelines.cluster.same_code import as_driver
from pipelines.dag.partitions import Pieces, record_name
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.records import (
    Record,
    Tally,
    TokenizeJob,
    encode_objects,
    media_records,
    text_records,
    to_documents,
)
from pipelines.tokenize.text_documents import stays_in_columns, text_documents
from pipelines.tokenize.video_pieces import Piece, cut_video, encode_piece, join_pieces, missing
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from storage.retry import Backoff, retry
from storage.store import Store
from tokenization.shards.document_parquet import to_batches, write_batches
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer

Result = TypeVar("Result")

_READ = Backoff(attempts=4, pause=2.0)
_ALONE = ("video", "records")  # their size does not say how much work they are


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
    in_order = sorted(objects, key=lambda found: (found.source, found.heldout, found.key))
    for (source, heldout), of_split in itertools.groupby(in_order, lambda found: (found.source, found.heldout)):
        groups: list[list[SourceObject]] = []
        size = 0
        for found in of_split:
            is_alone = found.kind in _ALONE or (groups and groups[-1][-1].kind in _ALONE)
            if not groups or is_alone or size + found.size > partition_bytes:
                groups.append([])
                size = 0
            groups[-1].append(found)
            size += found.size
        split = "heldout" if heldout else "train"
        for number, group in enumerate(groups):
            partitions.append(Partition(f"{source}-{split}-{number:06d}", source, heldout, tuple(group)))
    return partitions


@ray.remote
@as_driver
def tokenize_partition(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    """Commit a partition's documents and return its record; of a long video, first the pieces that are to be made.

    Raises UserError when its objects cannot be reached.
    """
    return _with_retries(part.name, lambda: _tokenized(part, job, pool, store))


@ray.remote
@as_driver
def tokenize_piece(piece: Piece, job: TokenizeJob, pool: Any, store: Store) -> None:
    """Commit a piece of a partition's video. Raises UserError when it cannot be reached."""
    _with_retries(piece.name, lambda: encode_piece(piece, job, pool, store))


def _with_retries(name: str, work: Callable[[], Result]) -> Result:
    """Repeat work that a store fails: its data is not bad, and the output must not depend on when a store answers."""
    try:
        return retry(work, f"tokenize: {name} cannot be read", _READ, is_transient=_is_transient)
    except OSError as error:
        if not _is_transient(error):
            raise
        raise UserError(
            f"tokenize: {name} cannot be read after {_READ.attempts} attempts ({error}); check that the store answers, "
            f"and run the same command again"
        ) from error


def _is_transient(error: Exception) -> bool:
    """Whether reading failed in a way that names no remedy itself."""
    return error.transient if isinstance(error, StoreError) else isinstance(error, OSError)


def _tokenized(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    pieces: list[Piece] = []
    if [found.kind for found in part.objects] == ["video"]:
        with contextlib.suppress(BadData):  # raised again where it is put in quarantine
            pieces = cut_video(part.name, part.objects[0], job)
    if len(pieces) > 1 and (ahead := missing(pieces, store)):
        return Pieces(tuple(ahead))
    tally = Tally()
    name = f"documents/{part.name}.parquet"
    tokenizer = load_text_tokenizer(str(fetch_tokenizer(job.recipe.text_tokenizer.path, job.recipe.storage.options)))
    with store.writing(name) as file:
        write_batches(file, _documents(part, pieces, job, pool, store, tokenizer, tally))
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    where = {"partition": part.name, "source": part.source, "heldout": part.heldout, "file": name, "sha256": sha256}
    record = {**where, **asdict(tally)}
    store.write_json(record_name(part.name), record)
    return record


def _documents(
    part: Partition,
    pieces: list[Piece],
    job: TokenizeJob,
    pool: Any,
    store: Store,
    tokenizer: TextTokenizer,
    tally: Tally,
) -> Iterator[pa.RecordBatch]:
    """Batches of the partition's documents, in order: texts in columns, what may have frames one by one."""
    for in_columns, group in itertools.groupby(part.objects, lambda found: stays_in_columns(found, job)):
        if in_columns:
            for found in group:
                yield from text_documents(found, job, tokenizer, tally)
        else:
            records = _records(list(group), pieces, job, pool, store, tally)
            yield from to_batches(to_documents(records, job, tokenizer, tally))


def _records(
    objects: list[SourceObject], pieces: list[Piece], job: TokenizeJob, pool: Any, store: Store, tally: Tally
) -> Iterator[Record]:
    if len(pieces) > 1:
        yield from media_records([(objects[0], join_pieces(pieces, store))], job, tally)
        return
    samples = pieces[0].samples if pieces else None
    for is_text, group in itertools.groupby(objects, lambda found: found.kind == "text"):
        if is_text:
            yield from itertools.chain.from_iterable(text_records(found, job, tally) for found in group)
        else:
            yield from media_records(encode_objects(list(group), job, pool, samples), job, tally)
