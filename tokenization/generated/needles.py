"""Needles hidden in text, and the questions about them behind it: the parts of one document. Pure.

In: settings, random numbers, how many tokens there is room for, text. Out: parts that fill the room exactly, of which
the answers carry loss: the numbers and what ends their sentences, and where a question asks for several needles also
the words that lead from one number to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenization.generated.pieces import Part, Pieces, pieces_of
from tokenization.generated.settings import Needles
from tokenization.generated.wording import Wording, draw_names, draw_numbers, draw_question, draw_wording
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import TextTokenizer

_SAME_WORDING = 0.7
"""Share of the documents in which all needles have one wording, so that the name alone tells them apart."""
_ASKED_TOGETHER = (0.8, 0.15, 0.05)
"""Shares of the questions that ask for one, two and three needles."""
_TEXT = 8
"""A document keeps at least one part in so many of its room for text."""


@dataclass(frozen=True)
class _Needle:
    """A needle in ids. head: up to the number; value: the number and what ends the sentence."""

    wording: Wording
    name: str
    head: np.ndarray
    value: np.ndarray

    @property
    def sentence(self) -> np.ndarray:
        return np.concatenate([self.head, self.value])


def needle_parts(
    settings: Needles, generator: np.random.Generator, room: int, tokenizer: TextTokenizer, text: np.ndarray
) -> list[Part]:
    """The parts of a document of `room` tokens. text: ids int32 [n], at least one."""
    pieces = pieces_of(tokenizer)
    most, most_asked = (int(generator.integers(low, high + 1)) for low, high in (settings.needles, settings.asked))
    hidden: list[_Needle] = []
    questions: list[list[Part]] = []
    left, n_asked = room, 0
    waiting = _draw_needles(settings, most, generator, pieces, tokenizer)
    while waiting:
        together = min(len(waiting), 1 + int(generator.choice(len(_ASKED_TOGETHER), p=_ASKED_TOGETHER)))
        together = max(1, min(together, most_asked - n_asked)) if hidden else 1
        asked, waiting = waiting[:together], waiting[together:]
        question = _question(asked, generator, pieces, tokenizer) if n_asked < most_asked else []
        size = sum(len(one.sentence) for one in asked) + sum(len(ids) for ids, _ in question)
        if hidden and size > left - room // _TEXT:
            break
        left -= size
        hidden += asked
        if question:
            questions.append(question)
            n_asked += together
    order = generator.permutation(len(hidden)).tolist()
    parts = _hide([hidden[one] for one in order], _text_of(text, left, generator), generator, pieces)
    for one in generator.permutation(len(questions)).tolist():
        parts += questions[one]
    return parts


def _draw_needles(
    settings: Needles, count: int, generator: np.random.Generator, pieces: Pieces, tokenizer: TextTokenizer
) -> list[_Needle]:
    shared = draw_wording(generator, pieces.words)
    is_shared = generator.random() < _SAME_WORDING
    needles = []
    names, numbers = draw_names(generator, pieces.words, count), draw_numbers(generator, settings.digits, count)
    for name, number in zip(names, numbers):
        wording = shared if is_shared else draw_wording(generator, pieces.words)
        told = wording.told(name)
        value = follow(tokenizer, told.rpartition(" ")[2], f"{number}{wording.end}")
        needles.append(_Needle(wording, name, follow(tokenizer, ".", told), value))
    return needles


def _question(
    asked: list[_Needle], generator: np.random.Generator, pieces: Pieces, tokenizer: TextTokenizer
) -> list[Part]:
    lead = draw_question(generator, pieces.words, [(one.wording, one.name) for one in asked])
    parts = [(follow(tokenizer, ".", lead), False), (asked[0].value, True)]
    return parts + [(ids, True) for one in asked[1:] for ids in (one.head, one.value)]


def _hide(hidden: list[_Needle], text: np.ndarray, generator: np.random.Generator, pieces: Pieces) -> list[Part]:
    """The text with the needles at random sentence breaks, in order."""
    places = np.sort(generator.choice(pieces.breaks(text), len(hidden)))
    parts: list[Part] = []
    done = 0
    for place, needle in zip(places.tolist(), hidden):
        parts += [(text[done:place], False), (needle.sentence, False)]
        done = place
    return [*parts, (text[done:], False)]


def _text_of(text: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """`length` ids of a text from a random place on, going on at its start, more than once where it is short."""
    start = int(generator.integers(len(text)))
    if start + length <= len(text):
        return text[start : start + length]
    return np.resize(np.roll(text, -start), length)
