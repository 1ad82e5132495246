"""Runs as the pipeline leaves them, made without a cluster: a document, a file of codes and a shard for each object."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pipelines.dag.kept import REQUEST
from pipelines.dag.manifest import FORMAT, STARTED, PlainRecord, digest
from pipelines.dag.plan import PlannedStage, plan
from pipelines.dag.records import RECORD_KEY, FooterRecords, JsonRecords
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.pack.record import PackOutputs, PackRecord, shard_name
from pipelines.run import run_stages
from pipelines.sources.listing import SourceObject, read_objects
from pipelines.sources.stage import SourcesRecord, SourcesStage
from pipelines.tokenize.codes.users import note_user
from pipelines.tokenize.record import (
    PARTITIONS,
    CodesUsed,
    TokenizedPartition,
    TokenizeFigures,
    TokenizeOutputs,
    TokenizeRecord,
    read_partitions,
    write_partitions,
)
from storage.store import Store
from testing.tiny_run import VOCABULARY
from tokenization.codecs.codes_file import CodesWriter, MediumCodes, object_id
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.document_parquet import read_documents, to_batches, write_batches
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard


def listed(name: str, etag: str = "1", **facts: Any) -> SourceObject:
    """A video, or what `facts` say that it is."""
    facts = {"kind": "video", "size": 1, "heldout": False, "side": {}} | facts
    return SourceObject(key=f"clips/{name}", source="clips", url=f"s3://b/{name}", etag=etag, **facts)


def encoding(fps: float) -> str:
    """The folder of the codes of so many frames a second."""
    return digest(fps)[:16]


@dataclass(frozen=True)
class Tokenize(Stage[TokenizeRecord]):
    """media: by object the media that its records name, (URL, etag). encoded: what it found no codes of."""

    kind = "tokenize"
    record = TokenizeRecord
    output_version = 1
    inputs = ("sources",)

    fps: float
    codes: Store
    root: Store
    media: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    encoded: list[str] = field(default_factory=list)
    kept_for = ("pack-video",)

    def settings(self) -> Mapping[str, Any]:
        return {"fps": self.fps}

    def run(self, context: StageContext) -> Made[TokenizeRecord]:
        note_user(self.codes, self.root)
        objects = read_objects(context.input("sources", SourcesRecord).store)
        records = FooterRecords(context.shared, "documents")
        names = {f"clips-{digest([one.url, one.etag, self.fps])[:16]}": one for one in objects}
        done = {record["partition"]: record for record in records.load(list(names))}
        for name in set(names) - set(done):
            done[name] = self._tokenize(name, names[name], context.shared)
            records.add(done[name])
        records.flush()
        parts = [
            TokenizedPartition(name, "clips", False, done[name]["file"], 1, 40, 0, done[name]["sha256"])
            for name in sorted(names)
        ]
        write_partitions(context.store, parts)
        url = None if self.codes.url == self.root.at("codes").url else self.codes.path()
        files = {PARTITIONS: context.store.sha256(PARTITIONS)}
        outputs = TokenizeOutputs(PARTITIONS, files=files, codes=CodesUsed(encoding(self.fps), url))
        return Made(TokenizeRecord(outputs, TokenizeFigures(len(parts), 40 * len(parts))))

    def _tokenize(self, name: str, found: SourceObject, shared: Store) -> dict[str, Any]:
        url, etag = self.media.get(found.url, (found.url, found.etag))
        named = {"media": {"url": url, "etag": etag}} if found.url in self.media else {}
        self._encode(object_id(url, etag), url)
        file = f"documents/{name}.parquet"
        tokens = np.arange(3, 43, dtype=np.int32)
        document = Document(found.key, "clips", tokens, ((1, 40),), {"url": found.url, **named})
        with shared.writing(file) as stream:
            write_batches(stream, to_batches([document]), lambda: {RECORD_KEY: json.dumps({"partition": name})})
        return {"partition": name, "file": file, "sha256": shared.sha256(file)}

    def _encode(self, object: bytes, url: str) -> None:
        file = f"{encoding(self.fps)}/data/{digest(object.hex())[:32]}.parquet"
        if self.codes.exists(file):
            return
        self.encoded.append(url)
        with self.codes.writing(file, exclusive=True) as stream:
            writer = CodesWriter(stream)
            one = np.zeros(1, np.int64)
            writer.write(MediumCodes(object, "", 1, one, one.astype(float), np.zeros((1, 4), np.int32), "none"))
            writer.close()


@dataclass(frozen=True)
class Pack(Stage[PackRecord]):
    """Packs the documents of each file to a shard."""

    kind = "pack"
    record = PackRecord
    output_version = 1
    inputs = ("tokenize",)
    name = "pack-video"
    kept_for = ("train-video",)

    context: int

    def settings(self) -> Mapping[str, Any]:
        return {"context": self.context}

    def run(self, context: StageContext) -> Made[PackRecord]:
        documents = context.input("tokenize", TokenizeRecord)
        names, stats = [], []
        for part in read_partitions(documents):
            partition = digest([part.file, self.context])[:16]
            names.append(shard_name(partition, 0))
            with documents.shared.open(part.file) as file:
                sequences = list(pack(read_documents(file), self.context, VOCABULARY, "vision-text"))
            with context.shared.writing(names[-1]) as file:
                stats.append(write_shard(file, sequences, VOCABULARY))
            context.shared.write_json(JsonRecords.name(partition), {"partition": partition})
        shards = ShardSet(self.context, VOCABULARY, "vision-text", tuple(names), tuple(stats))
        file = f"{context.store.url.rpartition('/')[2]}/sets/clips-train.json"
        write_set(context.shared, file, shards)
        outputs = PackOutputs({"clips": {"train": {"file": file}}}, context.store.hashes("sets"))
        return Made(PackRecord(outputs))


@dataclass(frozen=True)
class Train(Stage[PlainRecord]):
    """Keeps its data from when it has begun."""

    kind = "train"
    record = PlainRecord
    output_version = 1
    inputs = ("pack-video",)
    name = "train-video"
    keeps_its_data = "begun"

    lr: float = 1.0

    def settings(self) -> Mapping[str, Any]:
        return {"lr": self.lr}

    def run(self, context: StageContext) -> Made[PlainRecord]:
        context.store.write_json("model/config.json", {})
        return Made(PlainRecord())


@dataclass(frozen=True)
class Run:
    """A run of a recipe over some objects; `replace` it to have another recipe, or to have the objects grow."""

    root: Store
    objects: Sequence[SourceObject]
    fps: float = 4.0
    context: int = 64
    trains: bool = False
    codes: Store | None = None
    media: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def plan(self) -> list[PlannedStage]:
        return plan(self._stages(), self.root)

    def make(self, *stages: str) -> list[str]:
        """Run the stages that are not done, or those of them that are named; the media that were encoded."""
        planned = [one for one in self.plan() if not stages or one.name in stages]
        run_stages(planned, self.root)
        return [url for one in planned if isinstance(one.stage, Tokenize) for url in one.stage.encoded]

    def begin(self, stage: str, began: str) -> Store:
        """Leave a stage as a driver does that is killed at its beginning; its folder."""
        (planned,) = [one for one in self.plan() if one.name == stage]
        declared = {"format": FORMAT, **planned.declaration.to_json(), REQUEST: planned.request}
        planned.store.write_json(STARTED, declared)
        when = datetime.fromisoformat(began).timestamp()
        os.utime(planned.store.path(STARTED), (when, when))
        return planned.store

    @property
    def is_done(self) -> bool:
        return {one.status for one in self.plan()} == {"done"}

    def _stages(self) -> list[Stage[Any]]:
        made: list[Stage[Any]] = [
            SourcesStage(self.objects),
            Tokenize(self.fps, self.codes or self.root.at("codes"), self.root, self.media),
            Pack(self.context),
        ]
        return [*made, Train()] if self.trains else made


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """None of these stages needs a cluster, and each takes a minute by the clock."""
    minutes = itertools.count()
    start = datetime(2026, 11, 1, tzinfo=UTC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.run.ray_instance", lambda address, need: contextlib.nullcontext())
        patch.setattr("pipelines.run._now", lambda: (start + timedelta(minutes=next(minutes))).isoformat())
        yield
