"""What is known of shards without opening them: counts, hashes, and where every sequence is.

In: what `write_shard` measured, or the JSON of a manifest. Out: the `ShardStats` of one shard, and the `ShardSet` of
all shards of one packing, from which a loader finds any sequence and counts the examples of any batch. The index takes
about 30 bytes per sequence and its key.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from storage.errors import UserError
from tokenization.shards.tar_member import BLOCK
from tokenization.vocabulary import JointVocabulary


class IndexEntry(NamedTuple):
    """Where a sequence is in its shard: offset, length in bytes and CRC-32 of its safetensors, length of its JSON."""

    key: str
    offset: int
    length: int
    json_length: int
    n_examples: int
    crc32: int

    @property
    def json_offset(self) -> int:
        """The offset of its JSON, which follows padding to a whole block and a header block."""
        return -(-(self.offset + self.length) // BLOCK) * BLOCK + BLOCK


_DTYPES = dict(zip(IndexEntry._fields[1:], (np.int64, np.int64, np.int32, np.int32, np.uint32)))


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The entries of one shard: their keys, and an array [n] for each other field of `IndexEntry`."""

    key: tuple[str, ...]
    columns: Mapping[str, np.ndarray]

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[Any]]) -> ShardIndex:
        """From one iterable per field. Raises KeyError on a missing one, ValueError on unequal lengths."""
        key = tuple(columns["key"])
        arrays = {name: np.array(columns[name], dtype=dtype) for name, dtype in _DTYPES.items()}
        if any(array.shape != (len(key),) for array in arrays.values()):
            raise ValueError("the columns of a shard's index differ in length")
        return cls(key, arrays)

    def to_columns(self) -> dict[str, list[Any]]:
        """One plain list per field."""
        return {"key": list(self.key), **{name: column.tolist() for name, column in self.columns.items()}}

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, number: int) -> IndexEntry:
        return IndexEntry(self.key[number], *(int(column[number]) for column in self.columns.values()))

    def __iter__(self) -> Iterator[IndexEntry]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True, eq=False)
class ShardStats:
    """The contents of one shard. `bytes` and `sha256` are of the file, the other figures of its sequences.

    n_tokens counts every position, n_filled those of documents. n_examples counts documents and their pieces,
    n_documents only those that begin here, so that a split document counts once. targets: with loss, by modality.
    """

    context: int
    n_sequences: int
    n_tokens: int
    n_filled: int
    n_documents: int
    n_examples: int
    targets: Mapping[str, int]
    bytes: int
    sha256: str
    index: ShardIndex

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "targets": dict(self.targets), "index": self.index.to_columns()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ShardStats:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on other JSON."""
        parts = {**plain, "targets": targets_of(plain), "index": ShardIndex.from_columns(plain["index"])}
        return cls(**{field.name: parts[field.name] for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class ShardSet:
    """All shards of one packing, whose sequences are numbered from 0 through all shards in order.

    names: paths of the shards, as the reader's `opener` knows them. Raises UserError on a shard of another context.
    """

    context: int
    vocabulary: JointVocabulary
    objective: str
    names: tuple[str, ...]
    stats: tuple[ShardStats, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.stats) or len(set(self.names)) != len(self.names):
            raise ValueError("a shard set needs a distinct name for each shard")
        for name, stats in zip(self.names, self.stats):
            if stats.n_sequences and stats.context != self.context:
                raise UserError(f"shard {name} has context {stats.context}, not {self.context}: pack it again")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for a manifest, with the totals for its readers."""
        return {
            "context": self.context,
            "vocabulary": self.vocabulary.to_json(),
            "objective": self.objective,
            "totals": self.totals(),
            "shards": [{"name": name, **stats.to_json()} for name, stats in zip(self.names, self.stats)],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ShardSet:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on other JSON."""
        names = tuple(shard["name"] for shard in plain["shards"])
        vocabulary = JointVocabulary.from_json(plain["vocabulary"])
        return cls(
            plain["context"], vocabulary, plain["objective"], names, tuple(map(ShardStats.from_json, plain["shards"]))
        )

    def under(self, folder: str) -> ShardSet:
        """The same set with names below `folder`, so that one opener can serve several sets."""
        return replace(self, names=tuple(f"{folder.rstrip('/')}/{name}" for name in self.names))

    def totals(self) -> dict[str, Any]:
        """Sums over the shards of every count, and the number of shards."""
        counted = [field.name for field in fields(ShardStats) if field.name.startswith("n_")] + ["bytes"]
        sums = {name: sum(getattr(stats, name) for stats in self.stats) for name in counted}
        targets = {name: sum(stats.targets.get(name, 0) for stats in self.stats) for name in self.vocabulary.sizes}
        return {"n_shards": len(self.stats), **sums, "targets": targets}

    @functools.cached_property
    def n_examples(self) -> np.ndarray:
        """int32 [n_sequences]: examples in each sequence."""
        return np.concatenate([np.zeros(0, np.int32), *(stats.index.columns["n_examples"] for stats in self.stats)])

    @functools.cached_property
    def first(self) -> list[int]:
        """The number of each shard's first sequence, then the number of all sequences."""
        return list(itertools.accumulate((stats.n_sequences for stats in self.stats), initial=0))

    def __len__(self) -> int:
        return self.first[-1]

    def locate(self, number: int) -> tuple[str, ShardStats, IndexEntry]:
        """Shard name, its stats and the entry of sequence `number`. Raises IndexError out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        shard = bisect.bisect_right(self.first, number) - 1
        stats = self.stats[shard]
        return self.names[shard], stats, stats.index[number - self.first[shard]]


def targets_of(plain: Mapping[str, Any]) -> dict[str, int]:
    """Targets with loss by modality, from the JSON of a shard or of totals; the earlier format has text and vision."""
    return dict(plain["targets"]) if "targets" in plain else {"text": plain["n_text"], "vision": plain["n_vision"]}
