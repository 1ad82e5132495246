"""The partitions of a listing: which objects are tokenized together, and what decides the documents that they give.

A partition is named by where the hashes of its objects' keys fall and by a hash of everything that decides its
documents, so that whoever tokenizes the same objects by the same settings in a run finds them made. An object that is
added, removed or changed makes its own partition another, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dag.cut import cut
from pipelines.dag.manifest import digest
from pipelines.sources.listing import Listing, SourceObject
from tokenization.readers.records import is_one_record

_MOST_VIDEOS = 32  # of a partition, about: the size of a video does not say how much work it is


@dataclass(frozen=True)
class Partition:
    """One unit of work: the objects of one source and split, in order."""

    name: str
    source: str
    heldout: bool
    objects: tuple[SourceObject, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """What a partition holds, as far as its listing tells: how many objects that are one object or record by their
    kind, an image, a `.txt` file or a video that is one document, and the bytes of the others.
    """

    source: str
    ones: int
    size: int


class Partitions(Mapping[str, Partition]):
    """The partitions of a listing by name, in order, each made when it is asked for.

    settings: by source all that decides its documents beside the objects, as plain JSON.
    """

    def __init__(self, objects: Listing, partition_bytes: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._objects, self._identities = objects, objects.identities
        self._units: dict[str, np.ndarray] = {}
        heldout = objects.column("heldout").to_numpy(zero_copy_only=False)
        source = objects.column("source").cast(pa.large_string())
        keys, weights = objects.column("key"), _weights(objects, partition_bytes)
        for name in sorted(filter(None, objects.distinct("source"))):
            of_settings = bytes.fromhex(digest(settings[name]))
            of_source = pc.equal(source, name).to_numpy(zero_copy_only=False)
            for split, is_of_split in (("train", of_source & ~heldout), ("heldout", of_source & heldout)):
                numbers = np.flatnonzero(is_of_split)
                for one in cut(keys.take(pa.array(numbers)).to_pylist(), weights[numbers], partition_bytes):
                    units = numbers[one.units]
                    content = hashlib.sha256(of_settings + self._identities[units].tobytes())
                    self._units[f"{name}-{split}-{one.name}-{content.hexdigest()[:16]}"] = units

    def __getitem__(self, name: str) -> Partition:
        objects = tuple(self._objects.take(self._units[name]))
        return Partition(name, objects[0].source, objects[0].heldout, objects)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    @property
    def objects(self) -> Listing:
        """All objects of all partitions."""
        return self._objects

    def held(self, windows: bool) -> dict[str, Held]:
        """What each holds. windows: whether videos are cut in documents. No partition is made for it."""
        whole = ["image"] if windows else ["image", "video"]
        kind, url = self._objects.column("kind").cast(pa.large_string()), self._objects.column("url")
        is_text_file = np.fromiter((is_one_record(one.as_py()) for one in url), bool, len(url))
        is_one = _is_in(kind, whole) | (_is_in(kind, ["text"]) & is_text_file)
        size = np.where(is_one, 0, np.maximum(1, self._objects.column("size").to_numpy()))
        source = self._objects.column("source").cast(pa.large_string())
        return {
            name: Held(source[int(units[0])].as_py(), int(is_one[units].sum()), int(size[units].sum()))
            for name, units in self._units.items()
        }


def _weights(objects: Listing, partition_bytes: int) -> np.ndarray:
    """int64 [objects]: bytes, of some kinds at least so many that a partition has no more than `_MOST_VIDEOS`; of
    generated documents a whole partition's, so that more of them leave every partition as it is.
    """
    size, kind = objects.column("size").to_numpy(), objects.column("kind").cast(pa.large_string())
    counts_for_more = _is_in(kind, ["video", "records"])
    weights = np.maximum(size, np.where(counts_for_more, partition_bytes // _MOST_VIDEOS, 1))
    return np.where(_is_in(kind, ["generated"]), partition_bytes, weights)


def _is_in(column: pa.Array, values: list[str]) -> np.ndarray:
    found: np.ndarray = pc.is_in(column, value_set=pa.array(values, column.type)).to_numpy(zero_copy_only=False)
    return found
