"""Words, numbers and identifiers from a random generator, all of one draw different, for tasks whose keys nobody knows.

They are made, not taken from a list of words: no text of a training set tells them.
"""

from __future__ import annotations

import string
import uuid

import numpy as np

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "dr", "st")
_SYLLABLES = tuple(onset + vowel for onset in _ONSETS for vowel in "aeiou")


def draw_words(count: int, generator: np.random.Generator) -> list[str]:
    """So many different words of three syllables that can be spoken."""
    return ["".join(_SYLLABLES[digit] for digit in number) for number in _draw(count, 3, len(_SYLLABLES), generator)]


def draw_codes(count: int, letters: int, generator: np.random.Generator) -> list[str]:
    """So many different runs of lower-case letters."""
    alphabet = string.ascii_lowercase
    return ["".join(alphabet[digit] for digit in number) for number in _draw(count, letters, len(alphabet), generator)]


def draw_numbers(count: int, digits: int, generator: np.random.Generator) -> list[str]:
    """So many different numbers of so many digits, none of which begins with 0."""
    low = 10 ** (digits - 1)
    drawn = generator.choice(9 * low, count, replace=False)
    return [str(low + int(number)) for number in drawn]


def draw_uuids(count: int, generator: np.random.Generator) -> list[str]:
    """So many random UUIDs (version 4)."""
    return [str(uuid.UUID(bytes=generator.bytes(16), version=4)) for _ in range(count)]


def _draw(count: int, length: int, base: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count, length]: different numbers, by their digits in this base."""
    drawn = generator.choice(base**length, count, replace=False)
    return drawn[:, None] // base ** np.arange(length)[::-1] % base
