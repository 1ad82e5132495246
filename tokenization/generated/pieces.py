"""What generated documents need of a tokenizer: ids that stand for words and sentence breaks.

In: a text tokenizer. Out: arrays over its ids, made once a process.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from tokenization.text.tokenizer import TextTokenizer

Part = tuple[np.ndarray, bool]
"""Ids of a piece of a document, and whether they carry loss."""

_SENTENCE_END = re.compile(r"[.!?][\"')\]*_]*$")
_WORD = re.compile(r" [a-z]{3,}")


@dataclass(frozen=True)
class Pieces:
    """digits: int32, the ids of digits behind a space. plain: int32, ids of text with a letter and without digits, in
    the vocabulary's order. words: those of a whole word in small letters, as text. ends_sentence, begins_space: bool
    [tokenizer.size], by id.
    """

    digits: np.ndarray
    plain: np.ndarray
    words: tuple[str, ...]
    ends_sentence: np.ndarray
    begins_space: np.ndarray

    def breaks(self, text: np.ndarray) -> np.ndarray:
        """Positions in text ids [n] at which a sentence begins, ascending; 0 is one."""
        after = self.ends_sentence[text[:-1]] & self.begins_space[text[1:]]
        return np.concatenate([[0], np.flatnonzero(after) + 1])


@functools.lru_cache(maxsize=4)
def pieces_of(tokenizer: TextTokenizer) -> Pieces:
    """The pieces of a tokenizer."""
    (before,) = tokenizer.encode("a")[-1:]
    head = tokenizer.decode([before])
    texts = [tokenizer.decode([before, token])[len(head) :] for token in range(tokenizer.size)]
    plain = [i for i, text in enumerate(texts) if text.isprintable() and _has_letter(text) and not _has_digit(text)]
    return Pieces(
        np.unique([tokenizer.encode(f"a {digit}")[-1] for digit in range(10)]).astype(np.int32),
        np.array(plain, np.int32),
        tuple(dict.fromkeys(texts[i][1:] for i in plain if _WORD.fullmatch(texts[i]))),
        np.array([bool(_SENTENCE_END.search(text)) for text in texts]),
        np.array([text[:1].isspace() for text in texts]),
    )


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text) and "\ufffd" not in text


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)
