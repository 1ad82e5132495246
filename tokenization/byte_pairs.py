"""Byte-pair encoding of words, compiled: the ids that `tokenizers` gives, at twenty times its speed.

In: the merges of a sentencepiece-like vocabulary, in which words begin with their spaces. Out: the ids of a text.

A text may be cut between two characters wherever no merge has a left side that ends with the one and a right side that
begins with the other: the first merge across that place would be such a merge. Where no merge puts a space after
another character, every word with the spaces before it is such a part. Words repeat, so the ids of each are kept in a
hash table by its bytes, and a word that is not there is merged on the spot, lowest rank first, the leftmost of equals.
Words longer than that pays for are cut wherever they may be; what then is still too long goes to `tokenizers` itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tokenization.compiled import compiled

SPACE = "\u2581"  # sentencepiece writes a space as this
MERGED_BYTES = 256  # merging takes time that grows with the square of a part's length: up to here under 0.1 ms
CACHED_WORDS = 1 << 18  # 50 MB, touched as they fill
WORD_BYTES, WORD_IDS = 40, 11  # the longest word that is kept, and the most ids of one: 96 bytes with their counts
OUT_IDS = 1 << 18
PROBES = 16  # slots from its own that a word may lie in: a bound on what words made to collide can cost

_NO_MERGE = np.int64(np.iinfo(np.int64).max)
_ZERO = np.uint64(0)


class BytePairs:
    """Encodes texts with the merges of one vocabulary. Safe to share between threads, which take turns.

    vocabulary: ids by piece. merges: pairs of pieces, lowest rank first. long_part: ids int32 of a part of a text, its
    spaces written as U+2581, that exceeds `merged_bytes` and can be cut nowhere. Raises ValueError on what `suits`
    refuses.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        long_part: Callable[[str], np.ndarray],
        *,
        merged_bytes: int = MERGED_BYTES,
        cached_words: int = CACHED_WORDS,
    ) -> None:
        if not suits(vocabulary, merges):
            raise ValueError(
                "a vocabulary whose words do not begin with their spaces, or without a piece for each byte"
            )
        self._long_part = long_part
        self._lock = threading.Lock()
        single = {piece: id_ for piece, id_ in vocabulary.items() if len(piece) == 1} | {" ": vocabulary[SPACE]}
        char_ids = np.full(max(map(ord, single)) + 1, -1, dtype=np.int32)
        for char, id_ in single.items():
            char_ids[ord(char)] = id_
        byte_ids = np.array([vocabulary[f"<0x{byte:02X}>"] for byte in range(256)], dtype=np.int32)
        pairs = [(vocabulary[left] << 32) | vocabulary[right] for left, right in merges]
        ranked = [(rank << 32) | vocabulary[left + right] for rank, (left, right) in enumerate(merges)]
        joined = {(left[-1], right[0]) for left, right in merges}
        self._newline_is_alone = all((left == "\n") == (right == "\n") for left, right in joined)
        seams = [(_codepoint(left) << 32) | _codepoint(right) for left, right in joined]
        self._vocabulary = (
            char_ids,
            byte_ids,
            _table(np.array(pairs, dtype=np.int64), np.array(ranked, dtype=np.int64)),
            _table(np.array(seams, dtype=np.int64), np.zeros(len(seams), dtype=np.int64)),
        )
        self._cache = (
            np.zeros((2 * cached_words, 1 + WORD_BYTES // 8), dtype=np.uint64),
            np.empty((2 * cached_words, 1 + WORD_IDS), dtype=np.int32),
            np.zeros(1, dtype=np.int64),
            np.empty(WORD_BYTES // 8, dtype=np.uint64),
        )
        self._symbols = np.empty(merged_bytes, dtype=np.int64)
        self._ranks = np.empty(merged_bytes, dtype=np.int64)
        self._out = np.empty(max(OUT_IDS, merged_bytes), dtype=np.int32)

    @property
    def n_cached(self) -> int:
        """Words whose ids are kept."""
        return int(self._cache[2][0])

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [L] of a text as it stands: its spaces as " " or U+2581, any dummy prefix included.

        Raises UnicodeEncodeError on a lone surrogate, and whatever `long_part` raises.
        """
        if SPACE in text:
            text = text.replace(SPACE, " ")
        content = text.encode()
        data = np.frombuffer(content, dtype=np.uint8)
        made = []
        position = 0
        with self._lock:
            while position < len(data):
                position, end, n_ids = _encode(
                    data,
                    position,
                    self._newline_is_alone,
                    *self._vocabulary,
                    *self._cache,
                    self._symbols,
                    self._ranks,
                    self._out,
                )
                made.append(self._out[:n_ids].copy())
                if end > position:
                    part = content[position:end].decode().replace(" ", SPACE)
                    made.append(self._long_part(part))
                    position = end
        return made[0] if len(made) == 1 else np.concatenate([np.zeros(0, dtype=np.int32), *made])


def suits(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether these are exact here: words begin with their spaces, and there are pieces for a space and every byte."""
    words_begin_with_spaces = all(right[0] != SPACE or left[-1] == SPACE for left, right in merges)
    return words_begin_with_spaces and vocabulary.keys() >= {SPACE, *(f"<0x{byte:02X}>" for byte in range(256))}


def _codepoint(char: str) -> int:
    return ord(" " if char == SPACE else char)


@compiled
def _place_of(table: np.ndarray, key: np.int64) -> np.int64:
    """Where a key stands in a hash table that is at most half full, or where it would."""
    mask = len(table) - 1
    at = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while table[at, 0] != -1 and table[at, 0] != key:
        at = (at + 1) & mask
    return at


@compiled
def _table(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A hash table int64 [n, 2] of keys, -1 where it is empty, and their values."""
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
def _word_end(data: np.ndarray, start: int, longest: int, newline_is_alone: bool) -> int:
    """Where the word ends that begins here (spaces and what follows up to the next, or newlines), if not too long."""
    end = start
    limit = min(len(data), start + longest + 1)
    if newline_is_alone and data[start] == 10:
        while end < limit and data[end] == 10:
            end += 1
        return end
    while end < limit and data[end] == 32:
        end += 1
    while end < limit and data[end] != 32 and not (newline_is_alone and data[end] == 10):
        end += 1
    return end


@compiled
def _first_seam(data: np.ndarray, start: int, joined: np.ndarray) -> int:
    """The first place after `start` between two characters that no merge joins, or the end."""
    left, size = _codepoint_at(data, start)
    at = start + size
    while at < len(data):
        right, size = _codepoint_at(data, at)
        key = (left << 32) | right
        if joined[_place_of(joined, key), 0] != key:
            return at
        left = right
        at += size
    return at


@compiled
def _merge(
    data: np.ndarray,
    start: int,
    end: int,
    char_ids: np.ndarray,
    byte_ids: np.ndarray,
    merges: np.ndarray,
    symbols: np.ndarray,
    ranks: np.ndarray,
) -> int:
    """Leave the ids of a part in `symbols`; returns how many. Characters without a piece are bytes."""
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
            if ranks[i] < ranks[best]:  # equal ones are the same merge: the leftmost stays
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
    position: int,
    newline_is_alone: bool,
    char_ids: np.ndarray,
    byte_ids: np.ndarray,
    merges: np.ndarray,
    joined: np.ndarray,
    words: np.ndarray,
    word_ids: np.ndarray,
    n_words: np.ndarray,
    key: np.ndarray,
    symbols: np.ndarray,
    ranks: np.ndarray,
    out: np.ndarray,
) -> tuple[int, int, int]:
    """Ids of UTF-8 `data` from `position` into `out` until that is full; returns (position reached, end, ids).

    end > position: the part between them is too long to be merged here, and the next call goes on behind it.
    words: uint64 [n, 1 + WORD_BYTES / 8], the hash of each word kept, its lowest byte replaced by the number of the
    word's bytes, 0 where none is kept; and those bytes. word_ids: int32 [n, 1 + WORD_IDS], the number of its ids and
    they. n_words: [1]. key: the bytes of the word that is looked for.
    """
    longest = len(symbols)
    mask = len(words) - 1
    n_out = 0
    word_end = position
    is_long = False
    while position < len(data):
        if position >= word_end:
            word_end = _word_end(data, position, longest, newline_is_alone)
            is_long = word_end - position > longest
        end = _first_seam(data, position, joined) if is_long else word_end
        size = end - position
        if size > longest:
            return position, end, n_out
        if n_out + size > len(out):
            break
        free = np.int64(-1)
        n_parts = (size + 7) >> 3
        if size <= WORD_BYTES:
            code = np.uint64(size)
            for part in range(n_parts):
                key[part] = _eight_bytes(data, position + 8 * part, end)
                code = (code ^ (code >> np.uint64(31)) ^ key[part]) * np.uint64(0x9E3779B97F4A7C15)
            home = np.int64(code >> np.uint64(36)) & mask
            slot = home
            code = (code & ~np.uint64(0xFF)) | np.uint64(size)
            found = False
            for _ in range(PROBES):
                if words[slot, 0] == code:
                    found = True
                    for part in range(n_parts):
                        if words[slot, 1 + part] != key[part]:
                            found = False
                    if found:
                        break
                elif words[slot, 0] == 0:
                    free = slot
                    break
                slot = (slot + 1) & mask
            if found:
                known = word_ids[slot, 0]
                for i in range(known):
                    out[n_out + i] = word_ids[slot, 1 + i]
                n_out += int(known)
                position = end
                continue
        n = int(_merge(data, position, end, char_ids, byte_ids, merges, symbols, ranks))
        for i in range(n):
            out[n_out + i] = symbols[i]
        n_out += n
        if free >= 0 and n <= WORD_IDS:
            if n_words[0] >= len(words) // 2:
                words[:] = 0
                n_words[0] = 0
                free = home
            words[free, 0] = code
            for part in range(n_parts):
                words[free, 1 + part] = key[part]
            word_ids[free, 0] = n
            for i in range(n):
                word_ids[free, 1 + i] = symbols[i]
            n_words[0] += 1
        position = end
    return position, position, n_out
