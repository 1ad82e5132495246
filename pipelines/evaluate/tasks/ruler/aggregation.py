"""RULER's two tasks of aggregation: the words that occur most often in a long list or in coded text. Pure.

`cwe`: ten common words among uncommon ones, in a numbered list, after a short solved one. Common words stand in it 30
times and uncommon ones 3 times; below 4,096 tokens, 6 times and once. `fwe`: coded words, the k-th as often as
k^-2 / zeta(2) of all; the most frequent one, "...", is noise, and the three after it are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.evaluate.tasks.filling import fitting, joined, largest, lengths_of, pieces_after, too_small
from pipelines.evaluate.tasks.made_words import draw_codes, draw_words
from pipelines.evaluate.tasks.ruler.example import CONTEXTS, Example, Frame
from tokenization.text.tokenizer import TextTokenizer

CWE_ANSWER_TOKENS = 120
FWE_ANSWER_TOKENS = 50
COMMON = 10
FREQUENT = 3
ALPHA = 2.0  # of which `zeta_counts` knows the zeta function, pi^2 / 6
_LONG = 4096
_ITEM_TOKENS = 3  # the fewest of a numbered word
_COMMON_INSTRUCTION = "Some words of this numbered list occur more often than the others. Find the most common ones."
_COMMON_QUESTION = f"Question: Which {COMMON} words are the most common ones?\nAnswer: The most common words are:"
_FREQUENT_INSTRUCTION = 'This text is written in coded words. Leave "..." out and find the most frequent ones.'
_FREQUENT_QUESTION = (
    f"Question: Which {FREQUENT} coded words are the most frequent?\nAnswer: The most frequent coded words are:"
)


def common_words_example(context: int, tokenizer: TextTokenizer, generator: np.random.Generator) -> Example:
    """One example of `cwe`. Raises UserError where the context has no room."""
    often, seldom, shown_often, shown_others = (30, 3, 10, 20) if context >= _LONG else (6, 1, 3, 10)
    most = max(1, context // _ITEM_TOKENS // seldom)
    words = draw_words(2 * COMMON + shown_others + most, generator)
    shown, asked, others = words[: COMMON + shown_others], words[COMMON + shown_others :][:COMMON], words[-most:]
    solved = _numbered(generator.permutation(shown[:COMMON] * shown_often + shown[COMMON:]).tolist())
    instruction = f"{_COMMON_INSTRUCTION}\n{solved}\n\n{_COMMON_QUESTION} {' '.join(shown[:COMMON])}."
    frame = Frame.of(tokenizer, f"{instruction}\n\n{_COMMON_INSTRUCTION}", _COMMON_QUESTION, context, CWE_ANSWER_TOKENS)
    common = pieces_after(tokenizer, ".", [f" {word}" for word in asked])
    numbers = pieces_after(tokenizer, "a", [f" {number}." for number in range(1, often * COMMON + seldom * most + 1)])
    number_tokens = np.concatenate([[0], np.cumsum(lengths_of(numbers))])
    needed = often * sum(map(len, common)) + int(number_tokens[often * COMMON])
    room = frame.room(needed)
    uncommon = pieces_after(tokenizer, ".", [f" {word}" for word in others])
    items = often * COMMON + seldom * np.arange(1, most + 1)  # of the whole list with so many uncommon words
    sizes = often * sum(map(len, common)) + seldom * np.cumsum(lengths_of(uncommon)) + number_tokens[items]
    count = fitting(np.diff(sizes, prepend=0), room)
    listed = generator.permutation(np.repeat(np.arange(COMMON + count), [often] * COMMON + [seldom] * count))
    pieces = common + uncommon[:count]
    text = joined([part for number, word in zip(numbers, listed) for part in (number, pieces[word])])
    return frame.example(text, asked)


def frequent_words_example(context: int, tokenizer: TextTokenizer, generator: np.random.Generator) -> Example:
    """One example of `fwe`. Raises UserError where the context has no room."""
    words = ["...", *draw_codes(max(2 * FREQUENT, context // 50), 6, generator)]
    pieces = pieces_after(tokenizer, ".", [f" {word}" for word in words])
    lengths = lengths_of(pieces)
    frame = Frame.of(tokenizer, _FREQUENT_INSTRUCTION, _FREQUENT_QUESTION, context, FWE_ANSWER_TOKENS)

    def size(total: int) -> int:
        return int((zeta_counts(total, len(words)) * lengths).sum())

    least = next(n for n in range(1, 10**6) if _are_apart(zeta_counts(n, len(words))))
    total = largest(size, frame.room(1), least)
    if total is None:
        raise too_small(CONTEXTS, context, size(least) - frame.room(1))
    listed = generator.permutation(np.repeat(np.arange(len(words)), zeta_counts(total, len(words))))
    return frame.example(joined([pieces[word] for word in listed]), words[1 : FREQUENT + 1])


def zeta_counts(total: int, words: int) -> np.ndarray:
    """How often each word of a text of about `total` words occurs, int64 [words], by their rank."""
    ranks = np.arange(1, words + 1)
    return np.floor(total * ranks**-ALPHA / (np.pi**2 / 6) + 0.5).astype(np.int64)


def _are_apart(counts: np.ndarray) -> bool:
    """Whether the words asked for are those that occur more often than any other, with the noise above them."""
    first = counts[: FREQUENT + 2]
    return bool((np.diff(first) < 0).all())


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
