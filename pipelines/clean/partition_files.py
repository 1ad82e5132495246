"""Which of the files that a stage's fingerprints share are needed: those that a needed folder names.

In: needed folders. Out: names of partitions' files, documents and shards. A stage that has begun may find any of its
files again, so that all of them stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipelines.clean.folders import STAGES, StageFolder, refusing_damage
from pipelines.dag.manifest import StageOutput, read_manifest
from pipelines.dag.records import JsonRecords
from pipelines.pack.record import INDEX, SHARDS, PackRecord, index_name, partition_of
from pipelines.pack.stage import PackStage
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from pipelines.tokenize.stage import TokenizeStage
from pipelines.tokenize.tokenize_task import DOCUMENTS
from pipelines.tokenize.video_pieces import PIECES
from storage.store import Store

RECORDS = "partitions"
FOLDERS = {
    DOCUMENTS: "no stage that is needed lists these documents",
    PIECES: "the videos of these pieces are whole",
    SHARDS: "no stage that is needed lists these shards",
    RECORDS: "the shards of these partitions are not needed",
    INDEX: "the shards of these partitions are not needed",
}
"""Folders of partitions' files in that of a stage, and why one that is not needed is not."""


def needed_files(root: Store, folders: Iterable[StageFolder]) -> set[str]:
    """Names, below the run's root, of the partitions' files that finished folders list.

    Raises UserError where a list cannot be read, without which nothing may be removed.
    """
    named: set[str] = set()
    for folder in folders:
        store = root.at(STAGES, folder.key)
        with refusing_damage(store):
            named.update(f"{STAGES}/{folder.stage}/{name}" for name in _named(store, folder))
    return named


def _named(store: Store, folder: StageFolder) -> Iterator[str]:
    if folder.manifest is None or folder.manifest.format < 3:  # which has them in its own folder
        return
    if folder.kind == TokenizeStage.kind and (tokenized := read_manifest(store, TokenizeRecord)):
        yield from (part.file for part in read_partitions(StageOutput(store, tokenized)))
    elif folder.kind == PackStage.kind and (packed := read_manifest(store, PackRecord)):
        output = StageOutput(store, packed)
        for source, splits in packed.record.outputs.sets.items():
            for split in splits:
                shards = packed.record.read_set(output.shared, source, split)
                for shard in shards.names if shards else ():
                    yield shard
                    yield JsonRecords.name(partition_of(shard))
                    yield index_name(partition_of(shard))
