"""What a pack stage commits: sets of shards, by source and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.store import Store
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import read_set

SHARDS = "shards"
"""The folder of shards in that which the stage's fingerprints share."""


INDEX = "index"
"""That of the indexes of partitions' sequences, beside it."""


def index_name(partition: str) -> str:
    """Where the index of the sequences of a partition is, below the folder that fingerprints share."""
    return f"{INDEX}/{partition}.npy"


def shard_name(partition: str, number: int) -> str:
    """Where one of the shards of a partition is, below that folder."""
    return f"{SHARDS}/{partition}-{number:05d}.tar"


def partition_of(shard: str) -> str:
    """The partition that the shard of this name is of."""
    return shard.removeprefix(f"{SHARDS}/").rpartition("-")[0]


PackedSet = Mapping[str, Any]
"""`file`: the shard set, below the folder that the stage's fingerprints share, as its shards are. `fill`: share of
tokens that are no padding. Counts summed over its shards, by their names."""


@dataclass(frozen=True)
class PackOutputs:
    """sets: by source, then split. files: sha256 of the sets' files by name, in the stage's own folder. made_of: as in
    the tokenize stage.
    """

    sets: Mapping[str, Mapping[str, PackedSet]]
    files: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None
    objective: str | None = None
    made_of: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PackFigures:
    """skipped: documents by the reason for which they were left out."""

    sequences: int = 0
    documents: int = 0
    split_documents: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PackRecord:
    """The stage's record."""

    outputs: PackOutputs
    figures: PackFigures = field(default_factory=PackFigures)

    def read_set(self, store: Store, source: str, split: str) -> ShardSet | None:
        """A shard set, or None when that source has nothing in that split. store: `StageOutput.shared`."""
        entry = self.outputs.sets.get(source, {}).get(split)
        if entry is None:
            return None
        own = f"sets/{entry['file'].rpartition('/')[2]}"  # in the stage's own folder, as the hashes have it
        return read_set(store, entry["file"], self.outputs.files.get(own))
