"""Made-up names, and the wordings in which a needle tells a number and a question asks for it.

In: a random generator and words of a vocabulary. Out: names and wordings, of which there are more than any training
sees, so that what is learnt is to look back and not a phrase. None of them is one with which a model is evaluated
(`pipelines.evaluate`); a test holds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ONSETS = (
    "b", "br", "c", "d", "dr", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s", "st", "t", "th",
    "tr", "v", "w", "y", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "io", "ou")
_CODAS = ("", "", "", "l", "m", "n", "r", "s")
ENDINGS = ("ax", "eb", "ick", "ofe", "oz", "uld", "umph", "yx", "erp", "ash", "ovan", "ilk", "oft", "unz")
"""Of made-up names; no name of a place with which a model is evaluated ends like this."""

CLAUSES = (
    "The {a} {n} of {key} is",
    "The {n} of {key} is",
    "{key} has the {n}",
    "For {key} the {a} {n} reads:",
    "{n} of {key} =",
    "{key}'s {a} {n}:",
    "Remember that {key} goes with",
    "The {n} kept under {key} was:",
    "In the ledger {key} stands at",
    "On {key} they wrote the {a} {n}",
    "[{key}]",
    "{key} ->",
    "It is known that {key} carries {n}",
    "Whoever asks for {key} shall hear",
    "{a} {n} {key} :",
    "Here {key} counts",
)
ASKED = (
    "Which {n} goes with {key}?",
    "Tell the {n} of {key}.",
    "What was said of {key}?",
    "How does the line about {key} end?",
    "And {key}?",
    "Find {key}.",
)
FRAMES = (
    "\n\nQ: {asked}\nA: {clause}",
    "\n\nAsked: {asked}\nReply: {clause}",
    "\n\n{asked} {clause}",
    "\n\n{clause}",
    "\n{clause}",
    "\n\n* {asked}\n* {clause}",
    "\n\n{a} {b}: {asked}\n{c}: {clause}",
    "\n\nRecall {key}.\n{clause}",
)
_JOINERS = ("", ":", " =", " is", " :", " is:", ",", " reads")


@dataclass(frozen=True)
class Wording:
    """How needles are worded. clause: up to the number, with `{key}` for the name; end: what follows the number."""

    clause: str
    end: str
    noun: str

    def told(self, key: str) -> str:
        """What stands before the number."""
        clause = self.clause.replace("{key}", key)
        return clause[:1].upper() + clause[1:]


def draw_wording(generator: np.random.Generator, words: Sequence[str]) -> Wording:
    """One of `CLAUSES` with random words in it, or as often one of random words alone."""
    noun = _pick(generator, words)
    if generator.random() < 0.5:
        clause = _pick(generator, CLAUSES).replace("{a}", _pick(generator, words)).replace("{n}", noun)
    else:
        before = [_pick(generator, words) for _ in range(generator.integers(1, 5))]
        after = [_pick(generator, words) for _ in range(generator.integers(0, 3))]
        clause = " ".join([*before, "{key}", *after]) + _pick(generator, _JOINERS)
    end = "." if generator.random() < 0.7 else _pick(generator, (";", ",", " .", "!", " and", "\n"))
    return Wording(clause, end, noun)


def draw_question(generator: np.random.Generator, words: Sequence[str], asked: Sequence[tuple[Wording, str]]) -> str:
    """What leads to the answer about needles, of each its wording and name; it ends with the clause of the first."""
    lines = []
    for wording, key in asked:
        lines.append(_pick(generator, ASKED).replace("{n}", wording.noun).replace("{key}", key))
    wording, key = asked[0]
    frame = _pick(generator, FRAMES).replace("{asked}", " ".join(lines)).replace("{key}", key)
    for slot in ("{a}", "{b}", "{c}"):
        frame = frame.replace(slot, _pick(generator, words).capitalize())
    return frame.replace("{clause}", wording.told(key))


def draw_names(generator: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """So many different names: made up, of one or two parts, some with a word in small letters before them."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = _name(generator)
        kind = generator.random()
        if kind < 0.15:
            name = f"{name} {_name(generator)}"
        elif kind < 0.35:
            name = f"{_pick(generator, words)} {name}"
        elif kind < 0.5:
            name = f"{_pick(generator, words)} {_pick(generator, words)}"
        names[name] = None
    return list(names)


def draw_numbers(generator: np.random.Generator, digits: tuple[int, int], count: int) -> list[str]:
    """So many numbers without a leading zero, of so many digits. Different ones, where there are so many."""
    numbers = []
    for _ in range(count):
        length = int(generator.integers(digits[0], digits[1] + 1))
        numbers.append("".join(map(str, [generator.integers(1, 10), *generator.integers(0, 10, length - 1)])))
    return numbers


def _name(generator: np.random.Generator) -> str:
    parts = []
    for _ in range(generator.integers(1, 4)):
        parts += [_pick(generator, _ONSETS), _pick(generator, _VOWELS), _pick(generator, _CODAS)]
    return "".join([*parts[:-1], _pick(generator, _ONSETS), _pick(generator, ENDINGS)]).capitalize()


def _pick(generator: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(generator.integers(len(choices)))]
