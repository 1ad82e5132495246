"""Pseudo-random permutations that are computed, not stored.

In: indices below `size` and a 64-bit key. Out: the images of these indices under the permutation that the key selects.
A permutation is a Feistel network over the smallest power of four that is at least `size`; an image at or above `size`
is permuted again until it is below (cycle walking). It takes no memory, so a loader finds any position of an epoch of
400 million sequences directly. Only 64-bit integer arithmetic is used, so the result is the same on every platform and
with every version of numpy. It is compiled, since a window of documents is permuted for every few hundred sequences.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from tokenization.compiled import compiled

ROUNDS = 6

Words = TypeVar("Words", np.uint64, np.ndarray)


@compiled
def mix64(words: Words) -> Words:
    """Hash a uint64 word or an array of them (the finaliser of SplitMix64; Steele, Lea, Flood, OOPSLA 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """A key, uint64 of the broadcast shape of `parts`, from integers such as (seed, epoch, source) in this order."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & 0xFFFFFFFFFFFFFFFF)
        key = mix64(key ^ mix64(np.atleast_1d(word)))
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Images, int64 [n], of `index` (int64 [n], each in [0, size)) under the permutation of range(size) of `key`.

    key: uint64 [1] or [n] from `derive_key`; elements with equal keys share a permutation. Raises ValueError on an
    index out of range.
    """
    if len(index) and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"index {int(index.min())}..{int(index.max())} outside a permutation of {size}")
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    return _walk(np.asarray(index, np.int64), size, half, np.broadcast_to(key, np.shape(index)))


@compiled
def _walk(index: np.ndarray, size: int, half: int, keys: np.ndarray) -> np.ndarray:
    image = np.empty(len(index), np.int64)
    for at in range(len(index)):
        word = np.uint64(index[at])
        while True:  # ends, because each index lies on a cycle of the network's permutation
            word = _feistel(word, np.uint64(half), keys[at])
            if word < size:
                break
        image[at] = word
    return image


@compiled
def _feistel(word: np.uint64, half: np.uint64, key: np.uint64) -> np.uint64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = word >> half, word & mask
    for number in range(ROUNDS):
        # The round number lies above the bits of `right`, so that no two pairs of them coincide.
        salted = key ^ (right | (np.uint64(number) << np.uint64(40)))
        left, right = right, left ^ (mix64(salted) & mask)
    return (left << half) | right
