"""The tokenize stage: raw objects to documents in the joint vocabulary.

Decode tasks on CPUs stream bounded chunks of frames to a pool of encoder actors; text goes through the byte-pair
tokenizer; every record through its field spec. In: the listing, the VQGAN. Out: a Parquet of documents a partition,
its record with counts and quarantine. Objects and records that cannot be used cost themselves, not the stage, until
more than the recipe's share of them is bad.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from pipelines.frames import object_frames
from pipelines.partitions import record_name, run_partitions
from pipelines.progress import Bar, Meter
from pipelines.recipe import Recipe, Resources, VisualTokenizer
from pipelines.sources import SourceObject
from pipelines.storage import Store
from pipelines.urls import fetch_file, open_url
from pipelines.vqgan import load_vqgan
from tokenization.document import Document
from tokenization.documents import write_documents
from tokenization.errors import BadData, UserError
from tokenization.fields import FieldSpec, build_tokens, spec_for_record
from tokenization.records import BadRecord, read_records
from tokenization.text import TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

log = logging.getLogger("ringworld")

_READ_ATTEMPTS = 4
_CHUNKS_IN_FLIGHT = 2  # per decode task: one being encoded, one waiting


@dataclass(frozen=True)
class Partition:
    """One unit of work: the objects of one source and split, in order."""

    name: str
    source: str
    heldout: bool
    objects: tuple[SourceObject, ...]


@dataclass(frozen=True)
class TokenizeJob:
    """What every partition needs to know, and nothing that changes with the cluster."""

    recipe: Recipe
    vocabulary: JointVocabulary
    resolution: int


@dataclass
class _Tally:
    """Counts of one partition, filled in as it runs."""

    units: int = 0
    frames: int = 0
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def bad(self, found: SourceObject, reason: str, record: int | None = None) -> None:
        self.quarantine.append({"url": found.url, "key": found.key, "record": record, "reason": reason})


def cut_partitions(objects: Sequence[SourceObject], partition_bytes: int) -> list[Partition]:
    """Partitions of a listing: a video is one of its own, the rest is grouped by bytes. Independent of the cluster."""
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
            or found.kind == "video"
            or group[-1].kind == "video"
            or sum(o.size for o in group) + found.size > partition_bytes
        ):
            close()
        group.append(found)
    close()
    return partitions


def tokenize_all(
    recipe: Recipe,
    objects: Sequence[SourceObject],
    vocabulary: JointVocabulary,
    vqgan: Store | None,
    store: Store,
    line: Bar,
) -> dict[str, Any]:
    """Run every partition on the cluster and return the stage's part of the manifest."""
    partitions = {part.name: part for part in cut_partitions(objects, recipe.tokenize.partition_bytes)}
    job = TokenizeJob(recipe, vocabulary, recipe.vqgan.sizes.resolution if recipe.vqgan else 0)
    pool = recipe.tokenize.decode
    media = any(found.kind != "text" for found in objects)
    encoders = start_encoders(recipe.vqgan, vqgan, recipe.tokenize.encode) if recipe.vqgan and vqgan and media else []

    def submit(name: str) -> ray.ObjectRef:
        task = _tokenize_partition.options(name=f"tokenize:{name}", max_retries=-1, **pool.ray_options)
        return task.remote(partitions[name], job, encoders, store)

    def on_done(record: dict[str, Any]) -> None:
        line.advance(1, frames=record["frames"] or None, tokens=record["tokens"])
        for entry in record["quarantine"]:
            log.warning("tokenize: quarantined %s: %s", entry["url"], entry["reason"])

    records = run_partitions(submit, list(partitions), store, pool.workers, on_done)
    for actor in encoders:
        ray.kill(actor)
    quarantine = [entry for record in records for entry in record["quarantine"]]
    units = sum(record["units"] for record in records)
    _check_budget(quarantine, units, recipe.tokenize.max_bad_fraction)
    totals = {key: sum(record[key] for record in records) for key in ("documents", "tokens", "vision_tokens", "frames")}
    if not totals["documents"]:
        raise UserError("sources: no document came out of them; see the quarantine list of the tokenize stage")
    return {
        "outputs": {"partitions": [{key: record[key] for key in _LISTED} for record in records]},
        "figures": {**totals, "units": units, "quarantined": len(quarantine)},
        "quarantine": quarantine,
    }


_LISTED = ("partition", "source", "heldout", "file", "documents", "tokens", "vision_tokens", "sha256")


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


@ray.remote
def _tokenize_partition(part: Partition, job: TokenizeJob, encoders: list[Any], store: Store) -> dict[str, Any]:
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
    tally = _Tally()
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


def _documents(part: Partition, job: TokenizeJob, encoders: list[Any], tally: _Tally) -> Iterator[Document]:
    tokenizer = load_text_tokenizer(str(fetch_file(job.recipe.text_tokenizer.path, job.recipe.storage.options)))
    for found in part.objects:
        records = (
            _text_records(found, job, tally) if found.kind == "text" else _media_records(found, job, encoders, tally)
        )
        yield from _through_fields(found, records, job, tokenizer, tally)


def _through_fields(
    found: SourceObject,
    records: Iterator[tuple[int, dict[str, Any], dict[str, Any]]],
    job: TokenizeJob,
    tokenizer: TextTokenizer,
    tally: _Tally,
) -> Iterator[Document]:
    """Each record (number, fields, provenance) as a document."""
    specs = job.recipe.sources[found.source].fields
    for number, record, provenance in records:
        draw = int.from_bytes(hashlib.sha256(f"{job.recipe.seed}/{found.key}#{number}".encode()).digest()[:8], "big")
        spec: FieldSpec = spec_for_record(specs, draw)
        try:
            tokens, spans = build_tokens(record, spec, tokenizer, job.vocabulary)
        except BadData as error:
            tally.bad(found, str(error), number)
            continue
        where = {"url": found.url, "etag": found.etag, "record": number, "fields": str(spec), **provenance}
        yield Document(f"{found.key}#{number}", found.source, tokens, spans, where)


def _text_records(
    found: SourceObject, job: TokenizeJob, tally: _Tally
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
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


def _media_records(
    found: SourceObject, job: TokenizeJob, encoders: list[Any], tally: _Tally
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Records of a video or image, one each `frames_per_document` frames; none at all if any of it is unreadable."""
    try:
        codes, times = _encode(found, job, encoders)
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


def _encode(found: SourceObject, job: TokenizeJob, encoders: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 [n, codes] and times float64 [n] of all sampled frames; the frames are held a chunk at a time."""
    settings = job.recipe.tokenize
    waiting: deque[ray.ObjectRef] = deque()
    codes: list[np.ndarray] = []
    times: list[np.ndarray] = []
    chunks = object_frames(
        found,
        job.recipe.storage.options,
        fps=settings.fps,
        size=job.resolution,
        chunk=settings.chunk_frames,
        max_frames=job.recipe.sources[found.source].max_frames or settings.max_frames,
    )
    first = zlib.crc32(found.key.encode())  # short objects begin at different encoders
    for number, chunk in enumerate(chunks, first):
        if len(waiting) == _CHUNKS_IN_FLIGHT:
            codes.append(ray.get(waiting.popleft()))
        waiting.append(encoders[number % len(encoders)].encode.remote(chunk.frames))
        times.append(chunk.times)
    codes += [ray.get(reference) for reference in waiting]
    return np.concatenate(codes), np.concatenate(times)


def _check_budget(quarantine: Sequence[dict[str, Any]], units: int, budget: float) -> None:
    if len(quarantine) > budget * units:
        first = quarantine[0]
        raise UserError(
            f"{len(quarantine)} of {units} objects and records are bad, over tokenize.max_bad_fraction {budget}: "
            f"first {first['url']} ({first['reason']}); mend or remove them, or raise the budget"
        )
