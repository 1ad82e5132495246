"""What is known of shards without opening them: counts, hashes, and where every sequence lies.

In: what `write_shard` measured, or the JSON of a manifest. Out: `ShardStats` of one shard and `ShardSet` of all shards
of one packing, which is all a loader needs to find any sequence and to count the examples of any batch. Indices are
held as one numpy array a column, about 30 bytes a sequence and its key.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from storage.errors import UserError
from tokenization.vocabulary import JointVocabulary

BLOCK = 512  # bytes of a tar block: members and their headers begin at multiples of it


class IndexEntry(NamedTuple):
    """Where a sequence lies in its shard: byte offset, length and CRC-32 of its safetensors, length of its JSON."""

    key: str
    offset: int
    length: int
    json_length: int
    n_examples: int
    crc32: int

    @property
    def json_offset(self) -> int:
        """The JSON member follows: padding to a whole block, then its own header block."""
        return -(-(self.offset + self.length) // BLOCK) * BLOCK + BLOCK


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The entries of one shard, a column each: keys, offset and length int64 [n], the rest int32 or uint32 [n]."""

    key: tuple[str, ...]
    offset: np.ndarray
    length: np.ndarray
    json_length: np.ndarray
    n_examples: np.ndarray
    crc32: np.ndarray

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[Any]]) -> ShardIndex:
        """From one iterable a column. Raises KeyError on a column missing, ValueError on columns of unequal length."""
        dtypes = {"offset": np.int64, "length": np.int64, "json_length": np.int32, "n_examples": np.int32}
        dtypes["crc32"] = np.uint32
        arrays = {name: np.array(columns[name], dtype=dtype) for name, dtype in dtypes.items()}
        keys = tuple(columns["key"])
        if any(array.shape != (len(keys),) for array in arrays.values()):
            raise ValueError("the columns of a shard's index are not of one length")
        return cls(keys, **arrays)

    def to_columns(self) -> dict[str, list[Any]]:
        """Plain lists, one a column."""
        return {field.name: np.asarray(getattr(self, field.name)).tolist() for field in fields(self)}

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, number: int) -> IndexEntry:
        return IndexEntry(
            self.key[number],
            int(self.offset[number]),
            int(self.length[number]),
            int(self.json_length[number]),
            int(self.n_examples[number]),
            int(self.crc32[number]),
        )

    def __iter__(self) -> Iterator[IndexEntry]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True, eq=False)
class ShardStats:
    """What one shard holds. `bytes` and `sha256` are of the file, the other counts of its sequences.

    n_tokens counts every position, n_filled those of documents. n_examples counts documents and pieces (each weighs as
    one), n_documents only those that begin here, so that a split document counts once over all shards. targets: how
    many targets with loss there are, by modality.
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
        """Plain JSON, the index as one list a column."""
        return {**vars(self), "targets": dict(self.targets), "index": self.index.to_columns()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ShardStats:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on what is not one."""
        index = ShardIndex.from_columns(plain["index"])
        known = {field.name: plain[field.name] for field in fields(cls) if field.name not in ("targets", "index")}
        return cls(**known, targets=targets_of(plain), index=index)


@dataclass(frozen=True, eq=False)
class ShardSet:
    """All shards of one packing, in order: sequence number i is the i-th of the first shard's, second shard's, ... .

    names: paths of the shards relative to wherever the reader's `opener` looks. Raises UserError where a shard was
    packed at another context than the set.
    """

    context: int
    vocabulary: JointVocabulary
    objective: str
    names: tuple[str, ...]
    stats: tuple[ShardStats, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.stats) or len(set(self.names)) != len(self.names):
            raise ValueError("a shard set needs one distinct name a shard")
        for name, stats in zip(self.names, self.stats):
            if stats.n_sequences and stats.context != self.context:
                raise UserError(f"shard {name} has context {stats.context}, not {self.context}: pack it again")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for a manifest, with the totals for its readers."""
        shards = [{"name": name, **stats.to_json()} for name, stats in zip(self.names, self.stats)]
        return {
            "context": self.context,
            "vocabulary": self.vocabulary.to_json(),
            "objective": self.objective,
            "totals": self.totals(),
            "shards": shards,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ShardSet:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on what is not one."""
        shards = [dict(shard) for shard in plain["shards"]]
        names = tuple(shard.pop("name") for shard in shards)
        vocabulary = JointVocabulary.from_json(plain["vocabulary"])
        stats = tuple(map(ShardStats.from_json, shards))
        return cls(plain["context"], vocabulary, plain["objective"], names, stats)

    def under(self, folder: str) -> ShardSet:
        """The same set with its names below `folder`, to read several sets through one opener."""
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
        return np.concatenate([np.zeros(0, np.int32), *(stats.index.n_examples for stats in self.stats)])

    @functools.cached_property
    def first(self) -> np.ndarray:
        """int64 [n_shards+1]: number of each shard's first sequence, then the number of all sequences."""
        return np.cumsum([0, *(stats.n_sequences for stats in self.stats)])

    def __len__(self) -> int:
        return self._first[-1]

    def locate(self, number: int) -> tuple[str, ShardStats, IndexEntry]:
        """Shard name, its stats and the entry of sequence `number`. Raises IndexError out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        shard = bisect.bisect_right(self._first, number) - 1
        stats = self.stats[shard]
        return self.names[shard], stats, stats.index[number - self._first[shard]]

    @functools.cached_property
    def _first(self) -> list[int]:
        """`first`, for finding one at a time."""
        return self.first.tolist()


def targets_of(plain: Mapping[str, Any]) -> dict[str, int]:
    """Targets with loss by modality, of the JSON of a shard or of totals; older ones count text and vision alone."""
    return dict(plain["targets"]) if "targets" in plain else {"text": plain["n_text"], "vision": plain["n_vision"]}
