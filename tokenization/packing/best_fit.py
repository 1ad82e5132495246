"""Best-fit-decreasing bin packing, compiled.

In: the lengths of documents and the capacity of a bin. Out: the bin of each document, and the number of bins. The
longest document comes first; each goes to the fullest bin that has room for it. Bins are kept in one stack for each
amount of room left. A bitmap marks the stacks that are not empty, a second bitmap the words of the first that are not
zero, and so on, so the smallest sufficient room is found in log64(capacity) steps: four for a million tokens.
`subset_sum` fills bins better where more documents follow.
"""

from __future__ import annotations

import numpy as np

from tokenization.compiled import compiled

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    _BIT_OF[((int(_DE_BRUIJN) << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit
_ONE = np.uint64(1)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Pack `lengths` (int64 [N], each 1..capacity) into bins of `capacity`; returns (bin_of int64 [N], n_bins).

    Deterministic: equal lengths are placed in input order. Bins are numbered as they are opened, so lower numbers hold
    longer documents. At most 11/9 of the optimal number of bins plus 4 (Johnson 1973). O(N (log N + log64 capacity)).
    Raises ValueError on a length out of range.
    """
    lengths = check_lengths(lengths, capacity)
    if not len(lengths):
        return np.zeros(0, dtype=np.int64), 0
    # Sorting (length descending, index) as one integer is several times faster than a stable argsort.
    order = np.sort((capacity - lengths) * len(lengths) + np.arange(len(lengths))) % len(lengths)
    bin_of, n_bins = _place(lengths, order, capacity)
    return bin_of, int(n_bins)


def check_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The lengths as int64 [N], contiguous. Raises ValueError on one that is not in 1..capacity."""
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths {int(lengths.min())}..{int(lengths.max())} do not all lie in 1..{capacity}")
    return lengths


@compiled
def _lowest_bit(word: np.uint64) -> int:
    return _BIT_OF[((word & (~word + _ONE)) * _DE_BRUIJN) >> np.uint64(58)]


@compiled
def least_at_least(bits: np.ndarray, base: np.ndarray, n_levels: int, room: int) -> int:
    """The least set position >= room, or -1: climb until a word has a bit at or after it, then descend to that bit."""
    position = room
    for level in range(n_levels):
        word = position >> 6
        if base[level] + word < base[level + 1]:
            rest = bits[base[level] + word] >> np.uint64(position & 63)
            if rest != 0:
                position += _lowest_bit(rest)
                for below in range(level - 1, -1, -1):
                    position = (position << 6) + _lowest_bit(bits[base[below] + position])
                return position
        position = word + 1
    return -1


@compiled
def levels(capacity: int) -> tuple[np.ndarray, int]:
    """(base, n_levels) of the bitmap over positions 0..capacity, whose level l is bits[base[l]:base[l + 1]]."""
    base = np.zeros(13, dtype=np.int64)
    n_levels = 0
    words = capacity
    while n_levels == 0 or words > 0:
        words >>= 6
        base[n_levels + 1] = base[n_levels] + words + 1
        n_levels += 1
    return base, n_levels


@compiled
def _mark(bits: np.ndarray, base: np.ndarray, n_levels: int, position: int) -> None:
    for level in range(n_levels):
        bits[base[level] + (position >> 6)] |= _ONE << np.uint64(position & 63)
        position >>= 6


@compiled
def unmark(bits: np.ndarray, base: np.ndarray, n_levels: int, position: int) -> None:
    """Clear a position, and in each level above the bit of a word that has become zero."""
    for level in range(n_levels):
        word = base[level] + (position >> 6)
        bits[word] &= ~(_ONE << np.uint64(position & 63))
        if bits[word] != 0:
            break
        position >>= 6


@compiled
def _is_marked(bits: np.ndarray, position: int) -> bool:
    return (bits[position >> 6] >> np.uint64(position & 63)) & _ONE != 0


@compiled
def _place(lengths: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    base, n_levels = levels(capacity)
    bits = np.zeros(base[n_levels], dtype=np.uint64)
    # Read only where the bitmap has a bit, so not initialized: clearing 4 MB for each window would take as long as
    # packing it.
    top = np.empty(capacity + 1, dtype=np.int32)
    below = np.empty(len(order), dtype=np.int32)
    bin_of = np.empty(len(order), dtype=np.int64)
    n_bins = 0
    for document in order:
        length = lengths[document]
        room = least_at_least(bits, base, n_levels, length)
        if room < 0:
            room = capacity
            chosen = n_bins
            n_bins += 1
        else:
            chosen = top[room]
            top[room] = below[chosen]
            if below[chosen] < 0:
                unmark(bits, base, n_levels, room)
        bin_of[document] = chosen
        room -= length
        if room > 0:
            marked = _is_marked(bits, room)
            below[chosen] = top[room] if marked else -1
            top[room] = chosen
            if not marked:
                _mark(bits, base, n_levels, room)
    return bin_of, n_bins


@compiled
def push(
    bits: np.ndarray, base: np.ndarray, n_levels: int, top: np.ndarray, below: np.ndarray, position: int, document: int
) -> None:
    """Put a document on the stack of a position, and mark the position in the bitmap."""
    marked = _is_marked(bits, position)
    below[document] = top[position] if marked else -1
    top[position] = document
    if not marked:
        _mark(bits, base, n_levels, position)
