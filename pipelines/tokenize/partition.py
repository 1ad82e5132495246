"""The partitions of a listing: which objects are tokenized together, and what decides the documents that they give.

A partition is named by where the hashes of its objects' keys fall and by a hash of everything that decides its
documents, so that whoever tokenizes the same objects by the same settings in a run finds them made. An object that is
added, removed or changed makes its own partition another, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.dag.cut import cut
from pipelines.dag.manifest import digest
from pipelines.sources.listing import SourceObject

_MOST_VIDEOS = 32  # of a partition, about: the size of a video does not say how much work it is


@dataclass(frozen=True)
class Partition:
    """One unit of work: the objects of one source and split, in order."""

    name: str
    source: str
    heldout: bool
    objects: tuple[SourceObject, ...]


class Partitions(Mapping[str, Partition]):
    """The partitions of a listing by name, in order, each made when it is asked for.

    settings: by source all that decides its documents beside the objects, as plain JSON.
    """

    def __init__(
        self, objects: Sequence[SourceObject], partition_bytes: int, settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._objects = objects
        self._units: dict[str, np.ndarray] = {}
        by_split: dict[tuple[str, bool], list[int]] = {}
        for number, found in enumerate(objects):
            by_split.setdefault((found.source, found.heldout), []).append(number)
        for (source, heldout), numbers in sorted(by_split.items()):
            of_settings = bytes.fromhex(digest(settings[source]))
            weights = np.array([_weight(objects[number], partition_bytes) for number in numbers], np.int64)
            for one in cut((objects[number].key for number in numbers), weights, partition_bytes):
                units = np.array(numbers, np.int64)[one.units]
                content = hashlib.sha256(of_settings)
                for unit in units:
                    content.update(bytes.fromhex(digest(objects[unit].to_json())))
                split = "heldout" if heldout else "train"
                self._units[f"{source}-{split}-{one.name}-{content.hexdigest()[:16]}"] = units

    def __getitem__(self, name: str) -> Partition:
        objects = tuple(self._objects[int(unit)] for unit in self._units[name])
        return Partition(name, objects[0].source, objects[0].heldout, objects)

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


def _weight(found: SourceObject, partition_bytes: int) -> int:
    least = partition_bytes // _MOST_VIDEOS if found.kind in ("video", "records") else 1
    return max(found.size, least)
