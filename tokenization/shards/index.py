"""What is known of shards without opening them: counts, hashes, and where every sequence is.

In: what `write_shard` measured, or the files of a set (`set_files`). Out: the `ShardStats` of one shard, and the
`ShardSet` of all shards of one packing, from which a loader finds any sequence and counts the examples of any batch. An
entry of the index takes 24 bytes, in one array of all shards that can be mapped from a file, and its key none.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from storage.errors import UserError
from tokenization.shards.keys import compact_keys, keys_from_json, keys_to_json
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


ENTRY = np.dtype(list(zip(IndexEntry._fields[1:], ("<i8", "<u4", "<u4", "<i4", "<u4"))))
"""An `IndexEntry` but for its key, in an array."""


@dataclass(frozen=True, eq=False, slots=True)
class ShardIndex:
    """The entries of one shard. keys: of its n sequences. entries: array [n] of `ENTRY`, as a rule part of a set's.

    Raises ValueError on different numbers of both.
    """

    keys: Sequence[str]
    entries: np.ndarray

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.entries):
            raise ValueError(f"the index of a shard has {len(self.keys)} keys of {len(self.entries)} sequences")

    @classmethod
    def of(cls, entries: Sequence[IndexEntry]) -> ShardIndex:
        """The index of these entries."""
        return cls(compact_keys([one.key for one in entries]), np.array([one[1:] for one in entries], ENTRY))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]]) -> ShardIndex:
        """From one list per field, as earlier versions wrote it. Raises KeyError or ValueError on other lists."""
        return cls.of([IndexEntry(*row) for row in zip(*(columns[name] for name in IndexEntry._fields), strict=True)])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> IndexEntry:
        return IndexEntry(self.keys[number], *self.entries[number].item())

    def __iter__(self) -> Iterator[IndexEntry]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True, eq=False, slots=True)
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
        """Plain JSON of all but the entries of the index, whose keys are in it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "index"}
        return {**plain, "targets": dict(self.targets), "keys": keys_to_json(self.index.keys)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], entries: np.ndarray) -> ShardStats:
        """The inverse of `to_json`, with the entries (array [n] of `ENTRY`) that it leaves out.

        Also reads the earlier format, which has the whole index as lists. Raises KeyError, TypeError or ValueError on
        other JSON.
        """
        if "index" in plain:
            index = ShardIndex.from_columns(plain["index"])
        else:
            index = ShardIndex(keys_from_json(plain["keys"], plain["n_sequences"]), entries)
        parts = {**plain, "targets": targets_of(plain), "index": index}
        return cls(**{field.name: parts[field.name] for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class ShardSet:
    """All shards of one packing, whose sequences are numbered from 0 through all shards in order.

    names: paths of the shards, as the reader's `opener` knows them. entries: array of `ENTRY`, those of all shards end
    to end, of which the shards' own are views if it is given. Raises UserError on a shard of another context.
    """

    context: int
    vocabulary: JointVocabulary
    objective: str
    names: tuple[str, ...]
    stats: tuple[ShardStats, ...]
    entries: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.stats) or len(set(self.names)) != len(self.names):
            raise ValueError("a shard set needs a distinct name for each shard")
        for name, stats in zip(self.names, self.stats):
            if stats.n_sequences and stats.context != self.context:
                raise UserError(f"shard {name} has context {stats.context}, not {self.context}: pack it again")

    def under(self, folder: str) -> ShardSet:
        """The same set with names below `folder`, so that one opener can serve several sets."""
        return replace(self, names=tuple(f"{folder.rstrip('/')}/{name}" for name in self.names))

    def totals(self) -> dict[str, Any]:
        """Sums over the shards of every count, and the number of shards."""
        return totals((stats.to_json() for stats in self.stats), self.vocabulary)

    @functools.cached_property
    def n_examples(self) -> np.ndarray:
        """int32 [n_sequences]: examples in each sequence."""
        if self.entries is not None:
            return self.entries["n_examples"]
        return np.concatenate([np.zeros(0, np.int32), *(stats.index.entries["n_examples"] for stats in self.stats)])

    @functools.cached_property
    def first(self) -> list[int]:
        """The number of each shard's first sequence, then the number of all sequences."""
        return list(itertools.accumulate((stats.n_sequences for stats in self.stats), initial=0))

    def __len__(self) -> int:
        return self.first[-1]

    def shard_of(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n]: the number of the shard of each sequence (int64 [n]), none of which is out of range."""
        return np.searchsorted(self.first, numbers, side="right") - 1

    def locate(self, number: int) -> tuple[str, ShardStats, IndexEntry]:
        """Shard name, its stats and the entry of sequence `number`. Raises IndexError out of range."""
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        shard = bisect.bisect_right(self.first, number) - 1
        stats = self.stats[shard]
        return self.names[shard], stats, stats.index[number - self.first[shard]]


def totals(shards: Iterable[Mapping[str, Any]], vocabulary: JointVocabulary) -> dict[str, Any]:
    """Sums over the JSON of shards of every count, and their number."""
    counted = [field.name for field in fields(ShardStats) if field.name.startswith("n_")] + ["bytes"]
    sums, targets, n_shards = dict.fromkeys(counted, 0), dict.fromkeys(vocabulary.sizes, 0), 0
    for shard in shards:
        n_shards += 1
        for name in counted:
            sums[name] += shard[name]
        for name, number in targets_of(shard).items():
            targets[name] = targets.get(name, 0) + number
    return {"n_shards": n_shards, **sums, "targets": targets}


def targets_of(plain: Mapping[str, Any]) -> dict[str, int]:
    """Targets with loss by modality, from the JSON of a shard or of totals; the earlier format has text and vision."""
    return dict(plain["targets"]) if "targets" in plain else {"text": plain["n_text"], "vision": plain["n_vision"]}
