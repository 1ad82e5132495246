"""Packs documents into shards of one context on the cluster.

In: the documents of the tokenize stage. Out: shards, a record and the index of its sequences for each partition, and
`sets/<source>-<split>.{json,npy}`, the shard sets that the loader reads. Their indexes are those of the partitions one
behind the other; one at a time is in the driver's memory. Held-out documents are packed alike, into sets of their own.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.cluster.progress import Bar
from pipelines.cluster.same_code import as_driver
from pipelines.dag.cut import cut
from pipelines.dag.manifest import StageOutput, digest
from pipelines.dag.partitions import run_partitions
from pipelines.dag.records import JsonRecords
from pipelines.pack.record import PackFigures, PackOutputs, PackRecord, index_name, shard_name
from pipelines.recipe import Pack, PackedData
from pipelines.tokenize.record import TokenizedPartition, TokenizeRecord
from storage.errors import UserError
from storage.store import Store
from tokenization.packing.pack import PackCounts, pack_batches
from tokenization.shards.document_parquet import read_batches
from tokenization.shards.set_files import read_entries, write_entries, write_set_of
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class PackPartition:
    """One unit of work: document files of one source and split, in order."""

    name: str
    source: str
    split: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class PackJob:
    """What all partitions share."""

    settings: Pack
    stage: PackedData
    vocabulary: JointVocabulary
    seed: int


def cut_pack_partitions(
    tokenized: Sequence[TokenizedPartition], sources: Sequence[str], settings: Mapping[str, Any], partition_tokens: int
) -> list[PackPartition]:
    """The tokenized partitions of each source and split, grouped by tokens. Pure.

    settings: all that decides a partition's sequences beside its documents, as plain JSON. A partition is named by that
    and by its documents, so that documents that are added, removed or changed make their own partition another, and no
    other.
    """
    by_split: dict[tuple[str, str], list[TokenizedPartition]] = {}
    for part in tokenized:
        if part.source in sources and part.documents:
            by_split.setdefault((part.source, "heldout" if part.heldout else "train"), []).append(part)
    partitions = []
    for (source, split), parts in sorted(by_split.items(), key=lambda item: (item[0][0], SPLITS.index(item[0][1]))):
        tokens = np.array([part.tokens for part in parts], np.int64)
        places = (part.partition.rpartition("-")[0] for part in parts)  # without the hash of what is there now
        for one in cut(places, tokens, partition_tokens):
            chosen = [parts[unit] for unit in one.units]
            content = digest([settings, *([part.file, part.sha256] for part in chosen)])[:16]
            files = tuple(part.file for part in chosen)
            partitions.append(PackPartition(f"{source}-{split}-{one.name}-{content}", source, split, files))
    return partitions


def pack_all(
    job: PackJob,
    parts: Sequence[PackPartition],
    documents: StageOutput[TokenizeRecord],
    store: Store,
    shared: Store,
    line: Bar,
) -> PackRecord:
    """Pack every partition. store: the stage's folder. shared: that of all its fingerprints, for shards."""
    partitions = {part.name: part for part in parts}
    done: dict[str, dict[str, Any]] = {}

    task = _pack_partition.options(name=f"pack-{job.stage.name}", max_retries=0, **job.settings.pool.ray_options)

    def submit(name: str) -> ray.ObjectRef:
        return task.remote(partitions[name], job, documents.shared, shared)

    def on_done(record: dict[str, Any]) -> None:
        line.advance(1, sequences=record["sequences"], fill=record["fill"])
        done[record["partition"]] = record

    run_partitions(f"pack-{job.stage.name}", submit, list(partitions), JsonRecords(shared), job.settings.pool, on_done)
    records = [done[name] for name in partitions]
    own = store.url.rstrip("/").rpartition("/")[2]
    sets: dict[str, dict[str, Any]] = {source: {} for source in job.stage.source_names}
    for source, split in itertools.product(job.stage.source_names, SPLITS):
        chosen = [record for record in records if (record["source"], record["split"]) == (source, split)]
        shards = [shard for record in chosen for shard in record["shards"]]
        if not shards:
            if split == "train":
                raise UserError(
                    f"stage {job.stage.name}: source {source!r} gives no document to train on; widen "
                    f"min_document_tokens..max_document_tokens or drop the source from the stage"
                )
            continue
        name = f"{own}/sets/{source}-{split}.json"
        settings = (job.stage.context, job.vocabulary, job.stage.objective)
        entries = (read_entries(shared, record["index"]) for record in chosen)
        totals = write_set_of(shared, name, *settings, shards, entries)
        sets[source][split] = {"file": name, **totals, "fill": totals["n_filled"] / totals["n_tokens"]}
    skipped = sum((Counter(record["skipped"]) for record in records), Counter[str]())
    counts = {key: sum(record[key] for record in records) for key in ("sequences", "documents", "split_documents")}
    outputs = PackOutputs(
        sets=sets,
        files=store.hashes("sets"),
        context=job.stage.context,
        objective=job.stage.objective,
        made_of=documents.record.outputs.made_of,
    )
    return PackRecord(outputs, PackFigures(**counts, skipped=skipped))


@ray.remote
@as_driver
def _pack_partition(part: PackPartition, job: PackJob, documents: Store, store: Store) -> dict[str, Any]:
    counts = PackCounts()
    sequences = pack_batches(
        _documents(part, job, documents),
        job.stage.context,
        job.vocabulary,
        job.stage.objective,
        window=job.settings.window,
        seed=job.seed,
        key_prefix=f"{part.name}-",
        counts=counts,
    )
    shards: list[dict[str, Any]] = []
    entries: list[np.ndarray] = []
    filled = 0
    for first in sequences:
        name = shard_name(part.name, len(shards))
        with store.writing(name) as file:
            rest = itertools.islice(sequences, job.settings.sequences_per_shard - 1)
            stats = write_shard(file, itertools.chain([first], rest), job.vocabulary)
        shards.append({"name": name, **stats.to_json()})
        entries.append(stats.index.entries)
        filled += stats.n_filled
    index = index_name(part.name)
    write_entries(store, index, entries, counts.sequences)
    record = {
        "partition": part.name,
        "source": part.source,
        "split": part.split,
        "shards": shards,
        "index": index,
        "sequences": counts.sequences,
        "documents": counts.documents,
        "split_documents": counts.split,
        "skipped": dict(counts.skipped),
        "fill": filled / max(1, counts.sequences * job.stage.context),
    }
    store.write_json(JsonRecords.name(part.name), record)
    return record


def _documents(part: PackPartition, job: PackJob, documents: Store) -> Iterator[pa.RecordBatch]:
    longest = job.stage.max_document_tokens or math.inf
    for name in part.files:
        with documents.open(name) as file:
            for batch in read_batches(file):
                lengths = pc.list_value_length(batch.column("tokens")).to_numpy()
                chosen = (lengths >= job.stage.min_document_tokens) & (lengths <= longest)
                yield batch if chosen.all() else batch.filter(pa.array(chosen))
