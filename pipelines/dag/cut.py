"""Cuts of many weighted units into partitions that stay as they are when units come and go.

In: a name and a weight for each unit. Out: partitions, each named by a prefix of the hashes of its units' names. A
partition that is too heavy is split by the next bit of the hash, so where a unit belongs depends on the units that
share its prefix and on nothing else (extendible hashing: Fagin, Nievergelt, Pippenger, Strong 1979): one that is added,
removed or changed touches its own partition, at most splitting it in two or joining it with its neighbour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_BITS = 64


@dataclass(frozen=True)
class Cut:
    """One partition. name: unique in its cut, letters and digits. units: int64 [n], ascending numbers of its units."""

    name: str
    units: np.ndarray


def cut(names: Iterable[str], weights: np.ndarray, limit: int) -> list[Cut]:
    """Partitions of at most `limit`, sorted by name; a unit of more than half of it is a partition of its own.

    names: one a unit, distinct. weights: int64 [n]. O(n log n).
    """
    hashes = np.fromiter((_hash(name) for name in names), np.uint64)
    alone = weights > limit // 2
    cuts = [Cut(f"x{int(hashes[unit]):016x}", np.array([unit])) for unit in np.flatnonzero(alone)]
    together = np.flatnonzero(~alone)
    order = together[np.argsort(hashes[together], kind="stable")]
    for name, low, high in _leaves(hashes[order], weights[order], limit):
        cuts.append(Cut(name, np.sort(order[low:high])))
    return sorted(cuts, key=lambda one: one.name)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _leaves(hashes: np.ndarray, weights: np.ndarray, limit: int) -> Iterator[tuple[str, int, int]]:
    """(name, first, end) of each partition of units that are sorted by their hashes."""
    before = np.concatenate([[0], np.cumsum(weights)])
    waiting = [(0, 0, 0, len(hashes))]
    while waiting:
        depth, prefix, low, high = waiting.pop()
        if low == high:
            continue
        if before[high] - before[low] <= limit or high - low == 1 or depth == _BITS:
            yield f"{prefix:0{max(1, -(-depth // 4))}x}b{depth}", low, high
            continue
        upper = (2 * prefix + 1) << (_BITS - depth - 1)
        middle = low + int(np.searchsorted(hashes[low:high], np.uint64(upper)))
        waiting += [(depth + 1, 2 * prefix + 1, middle, high), (depth + 1, 2 * prefix, low, middle)]
