"""Fills bins to the brim from a pool of lengths, compiled.

In: lengths, and the capacity of a bin. Out: the bin of each, or -1 for those that stay in the pool until more come.
Bins are filled one after the other, each in four steps:

1. Long documents (over a sixteenth of the bin), as they are hard to place: first the longest of all, then the longest
   that either leaves room for several short ones or hardly any room.
2. Short documents in the order in which they came, so that kinds of documents mix in a bin as they do in the source.
3. For the last room, the subset of the next short documents whose sum comes closest to it: the possible sums are the
   bits of a row of words, and adding a length shifts the row.
4. If room is left, a long document is exchanged for a longer one, up to `EXCHANGES` times.

Good fits need many lengths to choose from, so bins are filled only until few (`keep`) are left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenization.compiled import compiled
from tokenization.packing.best_fit import check_lengths, least_at_least, levels, push, unmark

LONG = 16  # a length over capacity / LONG is long
CLOSING = 6  # step 3 begins with room for this many short documents of mean length: enough that their sums are dense
NEAR = 2048  # room up to capacity / NEAR is hardly any
UNITS = 12  # sums are computed in at most 2^UNITS units: exact for less room than that, else rounded up
SUM_WORDS = 640  # words of sums for a bin at most, which are ten rows or more: this bounds the time
PASSED = 64  # short documents passed over for a bin because they do not fit
EXCHANGES = 3

_ONE = np.uint64(1)


class _Pool(NamedTuple):
    """The lengths of N documents, the bin of each (-1: in the pool), and those in the pool.

    Long ones are in one stack per length: top[capacity - length] and `after`, with the bitmap of `best_fit`.
    Short ones are a doubly linked list in their order by `before` and `after`, which begins and ends at index N. left:
    int64 [3], the number of documents in the pool, of their tokens, and of the long ones.
    """

    lengths: np.ndarray
    bin_of: np.ndarray
    bits: np.ndarray
    base: np.ndarray
    n_levels: int
    top: np.ndarray
    before: np.ndarray
    after: np.ndarray
    left: np.ndarray


def fill_from(lengths: np.ndarray, capacity: int, keep: int, keep_tokens: int) -> tuple[np.ndarray, int]:
    """Fill bins of `capacity` from `lengths` (int64 [N], each 1..capacity) until few are left.

    Returns (bin_of int64 [N], -1 for those left over; n_bins). keep, keep_tokens: the most lengths that are left over
    and the most tokens in them. Deterministic. Raises ValueError on a length out of range.
    """
    lengths = check_lengths(lengths, capacity)
    bin_of = np.full(len(lengths), -1, dtype=np.int64)
    return bin_of, int(_fill(lengths, bin_of, capacity, keep, keep_tokens))


@compiled
def _fill(lengths: np.ndarray, bin_of: np.ndarray, capacity: int, keep: int, keep_tokens: int) -> int:
    long_from = capacity // LONG + 1
    base, n_levels = levels(capacity)
    pool = _Pool(
        lengths,
        bin_of,
        np.zeros(base[n_levels], dtype=np.uint64),
        base,
        n_levels,
        np.empty(capacity + 1, dtype=np.int32),
        np.empty(len(lengths) + 1, dtype=np.int32),
        np.empty(len(lengths) + 1, dtype=np.int32),
        np.zeros(3, dtype=np.int64),
    )
    reserve = _fill_pool(pool, capacity, long_from)
    sums = np.empty(SUM_WORDS, dtype=np.uint64)
    chosen = np.empty(SUM_WORDS, dtype=np.int32)
    inside = np.empty(LONG, dtype=np.int32)
    n_bins = 0
    while pool.left[0] > 0 and (pool.left[0] > keep or pool.left[1] > keep_tokens):
        room, n_inside = _place_long(pool, capacity, capacity, reserve, long_from, n_bins, inside, 0)
        room = _place_short(pool, room, reserve, n_bins)
        if room > 0:
            room = _place_sum(pool, room, n_bins, sums, chosen)
        if room >= long_from:
            room, n_inside = _place_long(pool, capacity, room, 0, long_from, n_bins, inside, n_inside)
        if room > 0:
            _exchange(pool, capacity, room, n_bins, inside, n_inside)
        n_bins += 1
    return n_bins


@compiled
def _fill_pool(pool: _Pool, capacity: int, long_from: int) -> int:
    """Put every document into the stacks or the list; returns the room that long ones leave for short ones in a bin."""
    n = len(pool.lengths)
    n_short = tokens_short = 0
    last = n
    for document in range(n):
        length = pool.lengths[document]
        pool.left[1] += length
        if length < long_from:
            pool.after[last] = document
            pool.before[document] = last
            last = document
            n_short += 1
            tokens_short += length
    pool.after[last] = n
    pool.before[n] = last
    for document in range(n - 1, -1, -1):  # so that the first of equal lengths is on top
        length = pool.lengths[document]
        if length >= long_from:
            push(pool.bits, pool.base, pool.n_levels, pool.top, pool.after, capacity - length, document)
    pool.left[0] = n
    pool.left[2] = n - n_short
    if not n_short:
        return 0
    return min(CLOSING * tokens_short // n_short, tokens_short * capacity // pool.left[1])


@compiled
def _longest(pool: _Pool, capacity: int, room: int) -> int:
    """The length of the longest long document that fits, 0 if none does."""
    position = least_at_least(pool.bits, pool.base, pool.n_levels, capacity - room)
    return 0 if position < 0 else capacity - position


@compiled
def _take_long(pool: _Pool, capacity: int, length: int, number: int) -> int:
    """Move a long document of this length to a bin and return it."""
    position = capacity - length
    document = pool.top[position]
    pool.top[position] = pool.after[document]
    if pool.after[document] < 0:
        unmark(pool.bits, pool.base, pool.n_levels, position)
    pool.bin_of[document] = number
    pool.left[0] -= 1
    pool.left[1] -= length
    pool.left[2] -= 1
    return document


@compiled
def _take_short(pool: _Pool, document: int, number: int) -> None:
    pool.after[pool.before[document]] = pool.after[document]
    pool.before[pool.after[document]] = pool.before[document]
    pool.bin_of[document] = number
    pool.left[0] -= 1
    pool.left[1] -= pool.lengths[document]


@compiled
def _place_long(
    pool: _Pool, capacity: int, room: int, reserve: int, long_from: int, number: int, inside: np.ndarray, n_inside: int
) -> tuple[int, int]:
    """Put long documents into a bin and list them in `inside`; returns the room left and their number."""
    while pool.left[2] > 0 and room >= long_from:
        length = _longest(pool, capacity, room)
        if length and room < capacity and room - length > capacity // NEAR:
            length = _longest(pool, capacity, room - reserve) if room - reserve >= long_from else 0
        if not length:
            break
        inside[n_inside] = _take_long(pool, capacity, length, number)
        n_inside += 1
        room -= length
    return room, n_inside


@compiled
def _place_short(pool: _Pool, room: int, reserve: int, number: int) -> int:
    """Put short documents into a bin in their order, until the room left, which is returned, is `reserve` at most."""
    end = len(pool.lengths)
    document = pool.after[end]
    passed = 0
    while document != end and room > reserve and passed < PASSED:
        following = pool.after[document]
        if pool.lengths[document] <= room:
            _take_short(pool, document, number)
            room -= pool.lengths[document]
        else:
            passed += 1
        document = following
    return room


@compiled
def _place_sum(pool: _Pool, room: int, number: int, sums: np.ndarray, chosen: np.ndarray) -> int:
    """Put the subset of the next short documents that fills the room best into a bin; returns the room left.

    Row k of `sums`, `width` words from k * width, has a bit for each sum of a subset of the first k of `chosen`.
    """
    unit = (room >> UNITS) + 1
    aim = room // unit
    width = (aim >> 6) + 1
    most = SUM_WORDS // width - 1
    sums[:width] = 0
    sums[0] = 1
    end = len(pool.lengths)
    document = pool.after[end]
    n_chosen = 0
    row = 0
    seen = 0
    while document != end and n_chosen < most and seen < 4 * most:
        length = (pool.lengths[document] + unit - 1) // unit
        if length <= aim:
            _add_to_sums(sums, row, width, length)
            chosen[n_chosen] = document
            n_chosen += 1
            row += width
            if _has_bit(sums, row, aim):
                break
        seen += 1
        document = pool.after[document]
    found = aim
    while not _has_bit(sums, row, found):
        found -= 1
    while found > 0:
        n_chosen -= 1
        row -= width
        if not _has_bit(sums, row, found):  # this document is needed for the sum
            document = chosen[n_chosen]
            found -= (pool.lengths[document] + unit - 1) // unit
            room -= pool.lengths[document]
            _take_short(pool, document, number)
    return room


@compiled
def _has_bit(words: np.ndarray, start: int, position: int) -> bool:
    return (words[start + (position >> 6)] >> np.uint64(position & 63)) & _ONE != 0


@compiled
def _add_to_sums(sums: np.ndarray, row: int, width: int, length: int) -> None:
    """Set the row after `row` to its sums and to each of them plus a length."""
    shift = min(length >> 6, width)
    left = np.uint64(length & 63)
    right = np.uint64(63) - left  # one less than the shift, which is done in two parts: shifting by 64 is undefined
    old, new = sums[row : row + width], sums[row + width : row + 2 * width]
    for word in range(shift):
        new[word] = old[word]
    if shift < width:
        new[shift] = old[shift] | (old[0] << left)
    same, low, high = old[shift + 1 :], old[: width - shift - 1], old[1 : width - shift]
    moved = new[shift + 1 :]
    for word in range(len(moved)):
        moved[word] = same[word] | (high[word] << left) | (low[word] >> right >> _ONE)


@compiled
def _exchange(pool: _Pool, capacity: int, room: int, number: int, inside: np.ndarray, n_inside: int) -> None:
    """Exchange long documents of a bin for longer ones that leave less room, the largest gain first."""
    for _ in range(EXCHANGES):
        gain = 0
        place = -1
        for at in range(n_inside):
            length = pool.lengths[inside[at]]
            longer = _longest(pool, capacity, length + room)
            if longer - length > gain:
                gain = longer - length
                place = at
        if gain == 0:
            break
        returned = inside[place]
        length = pool.lengths[returned]
        inside[place] = _take_long(pool, capacity, length + gain, number)
        push(pool.bits, pool.base, pool.n_levels, pool.top, pool.after, capacity - length, returned)
        pool.bin_of[returned] = -1
        pool.left[0] += 1
        pool.left[1] += length
        pool.left[2] += 1
        room -= gain
        if room == 0:
            break
