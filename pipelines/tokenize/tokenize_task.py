"""The task that tokenizes one partition, and that which encodes a piece of a long video of one.

In: a partition, what all partitions share, the pool of encoders. Out: `documents/<partition>.parquet`, whose footer has
the partition's record with its counts and quarantine. A partition that a dead worker left is made again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow as pa
import ray

from pipelines.cluster.same_code import as_driver
from pipelines.dag.partitions import Pieces
from pipelines.dag.records import RECORD_KEY
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import media_of
from pipelines.tokenize.codes.codes import Codes, OvertakenError
from pipelines.tokenize.generated_documents import generated_documents
from pipelines.tokenize.partition import Partition
from pipelines.tokenize.records import (
    Record,
    Tally,
    TokenizeJob,
    encode_objects,
    find_codes,
    keep_codes,
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
from tokenization.shards.shard import hash_file
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer

Result = TypeVar("Result")

DOCUMENTS, MADE = "documents", "made"
_READ = Backoff(attempts=4, pause=2.0)
_OVERTAKEN = 8  # times in a row that another run may commit the codes of a partition's media first


@ray.remote
@as_driver
def tokenize_partition(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    """Commit a partition's documents and return its record, and under `MADE` how many frames were encoded for it; of a
    long video, first the pieces that are to be made.

    Raises UserError when its objects cannot be reached.
    """
    return _with_retries(part.name, lambda: tokenize(part, job, pool, store))


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


def tokenize(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    """What the task of a partition does, once."""
    for _ in range(_OVERTAKEN):
        with contextlib.suppress(OvertakenError):
            return _tokenized(part, job, pool, store)
    raise UserError(
        f"tokenize: others have committed codes of the media of {part.name} first {_OVERTAKEN} times; run again when "
        f"the other runs that share storage.codes have ended"
    )


def _tokenized(part: Partition, job: TokenizeJob, pool: Any, store: Store) -> dict[str, Any] | Pieces:
    codes = Codes(job.codes) if job.codes else None
    pieces: list[Piece] = []
    if [found.kind for found in part.objects] == ["video"] and not (codes and _is_kept(part, job, codes)):
        with contextlib.suppress(BadData):  # raised again where it is put in quarantine
            pieces = cut_video(part.name, part.objects[0], job)
    if len(pieces) > 1 and (ahead := missing(pieces, store)):
        return Pieces(tuple(ahead))
    tally = Tally()
    tokenizer = load_text_tokenizer(str(fetch_tokenizer(job.recipe.text_tokenizer.path, job.recipe.storage.options)))
    documents = _documents(part, pieces, job, pool, store, tokenizer, tally, codes)
    name = f"{DOCUMENTS}/{part.name}.parquet"
    where = {"partition": part.name, "source": part.source, "heldout": part.heldout}
    with store.writing(name) as file:
        write_batches(file, documents, lambda: {RECORD_KEY: json.dumps({**where, **asdict(tally)}, sort_keys=True)})
        sha256 = hash_file(file)
        if codes:
            codes.commit()
    made = codes.frames_added if codes else 0
    return {**where, **asdict(tally), "file": name, "sha256": sha256, MADE: made}


def _is_kept(part: Partition, job: TokenizeJob, codes: Codes) -> bool:
    """Whether the codes of the partition's one video are there, so that it need not be cut."""
    (medium,) = media_of(part.objects[0], job.recipe.storage.options)
    return find_codes(part.objects[0], medium, job, codes) is not None


def _documents(
    part: Partition,
    pieces: list[Piece],
    job: TokenizeJob,
    pool: Any,
    store: Store,
    tokenizer: TextTokenizer,
    tally: Tally,
    codes: Codes | None,
) -> Iterator[pa.RecordBatch]:
    """Batches of the partition's documents, in order: texts in columns, what may have frames one by one."""
    if part.objects[0].kind == "generated":
        for found in part.objects:
            yield from to_batches(generated_documents(found, job, tokenizer, tally))
        return
    for in_columns, group in itertools.groupby(part.objects, lambda found: stays_in_columns(found, job)):
        if in_columns:
            for found in group:
                yield from text_documents(found, job, tokenizer, tally)
        else:
            objects = list(group)
            records = _records(objects, pieces, job, pool, store, tally, codes)
            yield from to_batches(to_documents(records, job, tokenizer, tally))
            yield from to_batches(to_documents(_turned(objects, job, pool, tally, codes), job, tokenizer, tally))


def _turned(
    objects: list[SourceObject], job: TokenizeJob, pool: Any, tally: Tally, codes: Codes | None
) -> Iterator[Record]:
    """Records of the objects' frames in each of their source's turns; what is bad is in quarantine already."""
    bad = {row["url"] for row in tally.quarantine}
    good = [found for found in objects if found.url not in bad]
    for turn in dict.fromkeys(turn for found in good for turn in job.turns(found)):
        videos = [found for found in good if turn in job.turns(found)]
        yield from media_records(encode_objects(videos, job, pool, codes=codes, turn=turn), job, tally)


def _records(
    objects: list[SourceObject],
    pieces: list[Piece],
    job: TokenizeJob,
    pool: Any,
    store: Store,
    tally: Tally,
    codes: Codes | None,
) -> Iterator[Record]:
    if len(pieces) > 1:
        outcome = join_pieces(pieces, store)
        if codes:
            keep_codes(outcome, codes, job.recipe.tokenize.fps)
        yield from media_records([(objects[0], outcome)], job, tally)
        return
    samples, total = (pieces[0].samples, pieces[0].total) if pieces else (None, None)
    for is_text, group in itertools.groupby(objects, lambda found: found.kind == "text"):
        if is_text:
            yield from itertools.chain.from_iterable(text_records(found, job, tally) for found in group)
        else:
            yield from media_records(encode_objects(list(group), job, pool, samples, total, codes), job, tally)
