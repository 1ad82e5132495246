"""Needle-in-a-haystack prompts: sentences hidden in a long text, and a question about them at its end. Pure.

As in LWM's evaluation (arXiv 2402.08268): a needle is "The special magic {city} number is: {number}" with seven digits,
put at a sentence break at some depth of the text, with room kept free for the answer. Cities and numbers of one prompt
are all different: with two needles about one city there is no right answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from storage.errors import UserError
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import TextTokenizer

CITIES = (
    "Accra", "Amsterdam", "Ankara", "Athens", "Baku", "Bangkok", "Barcelona", "Bogota", "Brussels", "Budapest", "Cairo",
    "Chicago", "Colombo", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana", "Helsinki", "Istanbul", "Jakarta",
    "Karachi", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne", "Mexico City", "Montreal",
    "Mumbai", "Nairobi", "Osaka", "Oslo", "Paris", "Prague", "Quito", "Riga", "Rome", "Santiago", "Seoul", "Shanghai",
    "Stockholm", "Sydney", "Tallinn", "Tbilisi", "Tokyo", "Toronto", "Tunis", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip

_SENTENCE_END = re.compile(r"[.!?][\"')\]*_]*$")


@dataclass(frozen=True)
class Needle:
    """One hidden fact."""

    city: str
    number: str

    @property
    def sentence(self) -> str:
        """How it stands in the text."""
        return f"The special magic {self.city} number is: {self.number}."


@dataclass(frozen=True)
class NeedlePrompt:
    """tokens: int32 [L], BOS to the question's last token. places: where each hidden sentence starts in them."""

    tokens: np.ndarray
    places: tuple[int, ...]


def draw_needles(count: int, generator: np.random.Generator) -> list[Needle]:
    """So many needles with different cities and different seven-digit numbers. Raises ValueError past the cities."""
    if count > len(CITIES):
        raise ValueError(f"{count} needles need as many cities, there are {len(CITIES)}")
    cities = generator.permutation(len(CITIES))[:count]
    numbers: list[int] = []
    while len(numbers) < count:
        number = int(generator.integers(1_000_000, 10_000_000))
        if number not in numbers:
            numbers.append(number)
    return [Needle(CITIES[city], str(number)) for city, number in zip(cities, numbers)]


def draw_hidden(
    count: int, asked: int, generator: np.random.Generator
) -> tuple[list[tuple[Needle, float]], list[Needle]]:
    """So many needles, each with a depth drawn from 0 to 1, and those of them that are asked for, in a drawn order."""
    needles = draw_needles(count, generator)
    hidden = [(needle, float(depth)) for needle, depth in zip(needles, generator.random(count))]
    return hidden, [needles[number] for number in generator.permutation(count)[:asked]]


def question(asked: Sequence[Needle]) -> str:
    """What stands after the text: it names the cities in order and begins the answer about the first."""
    *others, last = names = [needle.city for needle in asked]
    listed = f"{', '.join(others)} and {last}" if others else last
    verb, kind = ("are", "numbers") if others else ("is", "number")
    answer = f"Answer: The special magic {names[0]} number is:"
    return f"\n\nQuestion: What {verb} the special magic {listed} {kind}?\n{answer}"


def build_prompt(
    haystack: np.ndarray,
    hidden: Sequence[tuple[Needle, float]],
    asked: Sequence[Needle],
    context: int,
    tokenizer: TextTokenizer,
) -> NeedlePrompt:
    """A prompt that with its answer fits `context` tokens.

    haystack: text ids [n], repeated where the context is longer. hidden: needles with their depth, 0 (the start) to 1
    (the end); each goes to the last sentence break at or before it. asked: those the question is about, in order; they
    need not be hidden, to measure what is guessed. Raises UserError where the context has no room, ValueError without
    text or with nothing asked.
    """
    if not len(haystack) or not asked:
        raise ValueError("a prompt needs a text and a question about at least one needle")
    if len({needle.city for needle, _ in hidden}) < len(hidden):
        raise ValueError("two hidden needles are about one city")
    sentences = [follow(tokenizer, ".", needle.sentence) for needle, _ in hidden]
    end = follow(tokenizer, ".", question(asked))
    room = context - answer_buffer(context) - 1 - sum(map(len, sentences)) - len(end)
    if room < 1:
        why = f"{context} tokens leave no room for text beside the question and the answer"
        raise UserError(f"evaluate.needle.contexts: {why}; use at least {context - room + 1}")
    text = np.resize(haystack, room)
    breaks = [break_before(text, round(depth * room), tokenizer) for _, depth in hidden]
    whole, places = hide(text, breaks, sentences)
    tokens = np.concatenate([[tokenizer.bos_id], whole, end]).astype(np.int32)
    return NeedlePrompt(tokens, tuple(1 + place for place in places))


def hide(text: np.ndarray, breaks: Sequence[int], sentences: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Text ids [n] with each sentence put in at its break, int32, and where each then starts; of those at one break
    the first comes first.
    """
    pieces: list[np.ndarray] = []
    places, done, length = [0] * len(breaks), 0, 0
    for index in sorted(range(len(breaks)), key=breaks.__getitem__):
        length += breaks[index] - done
        places[index] = length
        length += len(sentences[index])
        pieces += [text[done : breaks[index]], sentences[index]]
        done = breaks[index]
    return np.concatenate([*pieces, text[done:]]).astype(np.int32), places


def answer_buffer(context: int) -> int:
    """Tokens kept free for the answer: 200, in a context shorter than 1,600 tokens an eighth of it."""
    return min(200, context // 8)


def break_before(text: np.ndarray, place: int, tokenizer: TextTokenizer) -> int:
    """The last position at or before `place` at which a sentence of text ids [n] begins; 0 and n always are."""
    if place >= len(text):
        return len(text)
    for position in range(place, 1, -1):
        if _ends_sentence(text, position, tokenizer):
            return position
    return 0


def _ends_sentence(text: np.ndarray, position: int, tokenizer: TextTokenizer) -> bool:
    """Whether a sentence ends just before `position` and white space follows."""
    start = max(0, position - 3)
    before = tokenizer.decode(text[start:position])
    after = tokenizer.decode(text[start : position + 1])[len(before) :]
    return bool(_SENTENCE_END.search(before)) and after[:1].isspace()


def digits_of(ids: Iterable[int], tokenizer: TextTokenizer) -> list[int]:
    """Positions of those ids that stand for digits."""
    return [index for index, token in enumerate(ids) if any(c.isdigit() for c in tokenizer.decode([token]))]


def found(answer: str, asked: Sequence[Needle]) -> float:
    """Share of the needles asked for whose number stands in the answer."""
    return sum(needle.number in answer for needle in asked) / len(asked)
