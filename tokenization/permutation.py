"""Stateless pseudo-random permutations: where does element i go, without holding the other size-1 answers.

In: indices below `size` and a 64-bit key. Out: the images of those indices under the permutation that the key names.
A Feistel network over the smallest even-width power of two that holds `size`, with cycle walking back into range, so a
permutation of 400 million sequences costs no memory, and position p of an epoch is found without replaying the first p.
Written in 64-bit integer arithmetic only: the same on every platform and with every version of numpy.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def mix64(words: np.ndarray) -> np.ndarray:
    """Hash uint64 words elementwise (the finaliser of SplitMix64; Steele, Lea, Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(_GOLDEN)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key (of the broadcast shape of `parts`) from integers such as (seed, epoch, source); order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & _WORD)
        key = mix64(key ^ mix64(np.atleast_1d(word)))
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Images of `index` (int64 [n], each in [0, size)) under the permutation of range(size) named by `key`; int64 [n].

    key: uint64 [1] or [n] from `derive_key`; elements with equal keys share one permutation. Raises ValueError on an
    index out of range.
    """
    if len(index) and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"index {int(index.min())}..{int(index.max())} outside a permutation of {size}")
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    image = index.astype(np.uint64)
    keys = np.broadcast_to(key, image.shape)
    # Outside [0, size) the walk goes on; it comes back because the network permutes the power of two above.
    walking = np.arange(len(image))
    while len(walking):
        image[walking] = _feistel(image[walking], half, keys[walking])
        walking = walking[image[walking] >= size]
    return image.astype(np.int64)


def _feistel(words: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & mask
    for number in range(ROUNDS):
        # The round number sits above the half-word: it must not collide with another value of `right`.
        salted = keys ^ (right | np.uint64(number << 40))
        left, right = right, left ^ (mix64(salted) & mask)
    return (left << half) | right
