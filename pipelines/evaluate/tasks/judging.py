"""How an answer is judged against what is right: parts that occur in it, exact match, F1 of words. Pure.

`share_of` and `any_of` are RULER's string matches (arXiv 2404.06654), which look for the answers as they are, whatever
their case. The others normalise first, as SQuAD's evaluation does (arXiv 1606.05250): lower case, no punctuation, no
articles, one space between words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def share_of(answer: str, wanted: Sequence[str]) -> float:
    """Share of the wanted texts that occur in the answer. Raises ValueError where nothing is wanted."""
    if not wanted:
        raise ValueError("no answer is named, so none can be right")
    return sum(one.lower() in answer.lower() for one in wanted) / len(wanted)


def any_of(answer: str, accepted: Sequence[str]) -> float:
    """1 where one of the accepted texts occurs in the answer, else 0."""
    return float(share_of(answer, accepted) > 0)


def normalised(text: str) -> str:
    """Text in lower case without punctuation and articles, its words apart by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the normalised answer is one of the accepted ones, else 0."""
    return float(normalised(answer) in map(normalised, accepted))


def word_f1(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 of the words of the answer and those of an accepted one; without words, whether both have none."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in accepted)


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 where the words of an accepted answer stand together in the normalised answer, else 0."""
    spaced = f" {normalised(answer)} "
    return float(any(f" {normalised(one)} " in spaced for one in accepted))


def _f1(answer: list[str], accepted: list[str]) -> float:
    if not answer or not accepted:
        return float(answer == accepted)
    shared = sum((Counter(answer) & Counter(accepted)).values())
    return 2 * shared / (len(answer) + len(accepted))
