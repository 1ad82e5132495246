"""Byte-pair encoding, compiled: the same ids as `tokenizers`, at twenty times its speed.

A text can be cut between two characters if no merge has a left side that ends with the first and a right side that
begins with the second, since only such a merge could cross the cut. Texts are cut at all such places: before the spaces
of a word, around most punctuation and between most scripts. The parts are short and recur, so a hash table keeps the
ids of each by its bytes. Other parts are merged, lowest rank first, the leftmost of equals; `tokenizers` encodes parts
that are too long for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tokenization.compiled import compiled

SPACE = "\u2581"  # how sentencepiece writes a space
MERGED_BYTES = 256  # the longest part merged here: the time grows with the square of the length, to 0.1 ms for this
CACHED_PARTS = 1 << 17  # 16 MB, touched as they fill
PART_BYTES, PART_IDS = 32, 6  # the most bytes and ids of a part in the table: with the hash 64 bytes, one cache line
OUT_IDS = 1 << 18
PROBES = 16  # slots searched for a part: a bound on the cost of parts made to collide

_NO_MERGE = np.int64(np.iinfo(np.int64).max)
_ZERO = np.uint64(0)
_ASCII = 128
_KEY = np.uint64((1 << 56) - 1)
Arrays = tuple[np.ndarray, ...]


class BytePairs:
    """Encodes texts with the merges of one vocabulary. Threads can share it; they take turns.

    vocabulary: ids by piece. merges: pairs of pieces, lowest rank first. long_part: gives the ids, int32, of a part
    over `merged_bytes`, with spaces as U+2581. Raises ValueError on a vocabulary that `suits` refuses.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        long_part: Callable[[str], np.ndarray],
        *,
        merged_bytes: int = MERGED_BYTES,
        cached_parts: int = CACHED_PARTS,
    ) -> None:
        if not suits(vocabulary):
            raise ValueError("a vocabulary without a piece for a space and each byte")
        self._long_part = long_part
        self._lock = threading.Lock()
        single = {piece: id_ for piece, id_ in vocabulary.items() if len(piece) == 1} | {" ": vocabulary[SPACE]}
        char_ids = np.full(max(_ASCII, *(ord(char) + 1 for char in single)), -1, dtype=np.int32)
        for char, id_ in single.items():
            char_ids[ord(char)] = id_
        byte_ids = np.array([vocabulary[f"<0x{byte:02X}>"] for byte in range(256)], dtype=np.int32)
        pairs = [(vocabulary[left] << 32) | vocabulary[right] for left, right in merges]
        ranked = [(rank << 32) | vocabulary[left + right] for rank, (left, right) in enumerate(merges)]
        joined = {(_codepoint(left[-1]), _codepoint(right[0])) for left, right in merges}
        in_ascii = np.zeros((_ASCII, _ASCII), dtype=np.bool_)
        for left, right in joined:
            if max(left, right) < _ASCII:
                in_ascii[left, right] = True
        seams = np.array([(left << 32) | right for left, right in joined], dtype=np.int64)
        self._vocabulary = (
            char_ids,
            byte_ids,
            _table(np.array(pairs, dtype=np.int64), np.array(ranked, dtype=np.int64)),
            in_ascii,
            _table(seams, np.zeros(len(seams), dtype=np.int64)),
        )
        self._out = np.empty(max(OUT_IDS, merged_bytes), dtype=np.int32)
        self._work = (
            np.zeros((2 * cached_parts, 8), dtype=np.uint64),
            np.zeros(1, dtype=np.int64),
            np.empty(max(merged_bytes, PART_IDS), dtype=np.int64),
            np.empty(merged_bytes, dtype=np.int64),
            self._out,
        )

    @property
    def n_cached(self) -> int:
        """The number of parts in the table."""
        return int(self._work[1][0])

    def encode_utf8(self, data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of concatenated texts in valid UTF-8, with any dummy prefix. Raises whatever `long_part` raises.

        data: uint8. ends: int64 [n], of the texts in it. Returns all ids, int32 [L], and the end of each text's,
        int64 [n].
        """
        data = data.view()
        data.flags.writeable = False  # so that numba compiles for one kind of array
        ends = np.ascontiguousarray(ends, dtype=np.int64)
        id_ends = np.zeros(len(ends), dtype=np.int64)
        made: list[np.ndarray] = []
        position = number = n_ids = 0
        with self._lock:
            while number < len(ends):
                position, end, number, n_new = _encode(
                    data, ends, id_ends, position, number, n_ids, self._vocabulary, self._work
                )
                made.append(self._out[:n_new].copy())
                n_ids += n_new
                if end > position:
                    made.append(self._long_part(data[position:end].tobytes().decode().replace(" ", SPACE)))
                    n_ids += len(made[-1])
                    position = end
        return made[0] if len(made) == 1 else np.concatenate([np.zeros(0, dtype=np.int32), *made]), id_ends


def suits(vocabulary: Mapping[str, int]) -> bool:
    """Whether the vocabulary can encode every text, because it has pieces for a space and for every byte."""
    return vocabulary.keys() >= {SPACE, *(f"<0x{byte:02X}>" for byte in range(256))}


def _codepoint(char: str) -> int:
    return ord(" " if char == SPACE else char)


@compiled
def _place_of(table: np.ndarray, key: np.int64) -> np.int64:
    """The slot of a key in a hash table that is at most half full, or the empty slot where it belongs."""
    mask = len(table) - 1
    at = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while table[at, 0] != -1 and table[at, 0] != key:
        at = (at + 1) & mask
    return at


@compiled
def _table(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A hash table int64 [n, 2] of keys, -1 in empty slots, and their values."""
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table = np.empty((size, 2), dtype=np.int64)
    table[:, 0] = -1
    table[:, 1] = _NO_MERGE
    for i in range(len(keys)):
        place = _place_of(table, keys[i])
        table[place, 0] = keys[i]
        table[place, 1] = values[i]
    return table


@compiled
def _codepoint_at(data: np.ndarray, at: int) -> tuple[np.int64, int]:
    """The character that begins at a byte of valid UTF-8, and its number of bytes."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (np.int64(data[at + 1]) & 0x3F), 2
    if first < 0xF0:
        point = ((first & 0x0F) << 12) | ((np.int64(data[at + 1]) & 0x3F) << 6)
        return point | (np.int64(data[at + 2]) & 0x3F), 3
    point = ((first & 0x07) << 18) | ((np.int64(data[at + 1]) & 0x3F) << 12)
    return point | ((np.int64(data[at + 2]) & 0x3F) << 6) | (np.int64(data[at + 3]) & 0x3F), 4


@compiled
def _part_end(data: np.ndarray, start: int, stop: int, in_ascii: np.ndarray, joined: np.ndarray) -> int:
    """The first cut after `start`, between two characters that no merge joins, or `stop`."""
    at = start
    byte = data[at]
    while byte < _ASCII:
        at += 1
        if at == stop:
            return at
        following = data[at]
        if following < _ASCII and not in_ascii[byte, following]:
            return at
        if following >= _ASCII:
            break
        byte = following
    if byte < _ASCII:
        left = np.int64(byte)
    else:
        left, size = _codepoint_at(data, at)
        at += size
    while at < stop:
        right, size = _codepoint_at(data, at)
        if left < _ASCII and right < _ASCII:
            if not in_ascii[left, right]:
                break
        else:
            key = (left << 32) | right
            if joined[_place_of(joined, key), 0] != key:
                break
        left = right
        at += size
    return at


@compiled
def _merge(data: np.ndarray, start: int, end: int, vocabulary: Arrays, symbols: np.ndarray, ranks: np.ndarray) -> int:
    """Write the ids of a part to `symbols` and return their number. Characters without a piece become bytes."""
    char_ids, byte_ids, merges, _, _ = vocabulary
    n = 0
    at = start
    while at < end:
        point, size = _codepoint_at(data, at)
        if point < len(char_ids) and char_ids[point] >= 0:
            symbols[n] = char_ids[point]
            n += 1
        else:
            for byte in range(at, at + size):
                symbols[n] = byte_ids[data[byte]]
                n += 1
        at += size
    for i in range(n - 1):
        ranks[i] = merges[_place_of(merges, (symbols[i] << 32) | symbols[i + 1]), 1]
    while n > 1:
        best = 0
        for i in range(1, n - 1):
            if ranks[i] < ranks[best]:  # of equal ranks, which are the same merge, the leftmost stays
                best = i
        if ranks[best] == _NO_MERGE:
            break
        symbols[best] = ranks[best] & 0xFFFFFFFF
        n -= 1
        for i in range(best + 1, n):
            symbols[i] = symbols[i + 1]
            ranks[i - 1] = ranks[i]
        if best > 0:
            ranks[best - 1] = merges[_place_of(merges, (symbols[best - 1] << 32) | symbols[best]), 1]
        if best < n - 1:
            ranks[best] = merges[_place_of(merges, (symbols[best] << 32) | symbols[best + 1]), 1]
    return n


@compiled
def _eight_bytes(data: np.ndarray, start: int, end: int) -> np.uint64:
    word = _ZERO
    for i in range(min(8, end - start)):
        word |= np.uint64(data[start + i]) << np.uint64(8 * i)
    return word


@compiled
def _encode(
    data: np.ndarray,
    ends: np.ndarray,
    id_ends: np.ndarray,
    position: int,
    number: int,
    n_before: int,
    vocabulary: Arrays,
    work: Arrays,
) -> tuple[int, int, int, int]:
    """Write the ids of texts, from `position` in text `number` on, to `out` until it is full or all are done.

    Returns (position, end, number, n_out): the position and text reached and the number of ids written. If end >
    position, the part between them is too long to be merged here, and the next call is to continue at `end`. n_before:
    the ids of earlier calls, for `id_ends`. parts: uint64 [n, 8], the hash table, a row for each part: a hash with the
    number of bytes in its lowest byte and of ids in its highest, or 0 in an empty row; the bytes; the ids, two a word.
    n_parts: int64 [1], the number of parts in the table.
    """
    char_ids, _, _, in_ascii, joined = vocabulary
    parts, n_parts, symbols, ranks, out = work
    mask = len(parts) - 1
    n_out = 0
    while number < len(ends):
        stop = ends[number]
        while position < stop:
            end = _part_end(data, position, stop, in_ascii, joined)
            size = end - position
            if size > len(ranks):
                return position, end, number, n_out
            if n_out + max(size, PART_IDS) > len(out):
                return position, position, number, n_out
            if size == 1 and data[position] < _ASCII and char_ids[data[position]] >= 0:
                out[n_out] = char_ids[data[position]]
                n_out += 1
                position = end
                continue
            free = np.int64(-1)
            home = np.int64(0)
            code = first = second = third = fourth = _ZERO
            if size <= PART_BYTES:
                first = _eight_bytes(data, position, end)
                code = (first ^ np.uint64(size)) * np.uint64(0x9E3779B97F4A7C15)
                if size > 8:
                    second = _eight_bytes(data, position + 8, end)
                    code = (code ^ (code >> np.uint64(31)) ^ second) * np.uint64(0x9E3779B97F4A7C15)
                if size > 16:
                    third = _eight_bytes(data, position + 16, end)
                    fourth = _eight_bytes(data, position + 24, end)
                    code = (code ^ (code >> np.uint64(31)) ^ third) * np.uint64(0x9E3779B97F4A7C15)
                    code = (code ^ (code >> np.uint64(31)) ^ fourth) * np.uint64(0x9E3779B97F4A7C15)
                home = np.int64(code >> np.uint64(36)) & mask
                code = (code >> np.uint64(16) << np.uint64(8)) | np.uint64(size)
                slot = home
                known = np.int64(-1)
                for _ in range(PROBES):
                    row = parts[slot]
                    if row[0] & _KEY == code:
                        if row[1] == first and row[2] == second and row[3] == third and row[4] == fourth:
                            known = np.int64(row[0] >> np.uint64(56))
                            for i in range(3):
                                out[n_out + 2 * i] = np.int32(row[5 + i] & np.uint64(0xFFFFFFFF))
                                out[n_out + 2 * i + 1] = np.int32(row[5 + i] >> np.uint64(32))
                            break
                    elif row[0] == 0:
                        free = slot
                        break
                    slot = (slot + 1) & mask
                if known >= 0:
                    n_out += int(known)
                    position = end
                    continue
            n = int(_merge(data, position, end, vocabulary, symbols, ranks))
            for i in range(n):
                out[n_out + i] = symbols[i]
            n_out += n
            position = end
            if free >= 0 and n <= PART_IDS:
                if n_parts[0] >= len(parts) // 2:
                    parts[:] = 0
                    n_parts[0] = 0
                    free = home
                row = parts[free]
                row[0] = code | (np.uint64(n) << np.uint64(56))
                row[1], row[2], row[3], row[4] = first, second, third, fourth
                for i in range(n, PART_IDS):
                    symbols[i] = 0
                for i in range(3):
                    row[5 + i] = np.uint64(symbols[2 * i]) | (np.uint64(symbols[2 * i + 1]) << np.uint64(32))
                n_parts[0] += 1
        id_ends[number] = n_before + n_out
        number += 1
    return position, position, number, n_out
