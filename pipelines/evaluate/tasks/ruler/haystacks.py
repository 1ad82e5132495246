"""Texts of an exact room in which something is hidden: sentences that repeat, real text, or other needles. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipelines.evaluate.tasks.filling import fitting, joined, lengths_of, pieces_after
from pipelines.evaluate.tasks.needle_prompts import break_before, hide
from tokenization.text.tokenizer import TextTokenizer

NOISE = ("The lamp is lit.", "The road is long.", "The tea is warm.", "We walk on.", "Then we come home again.")
"""Sentences that say nothing and repeat, as in passkey retrieval (arXiv 2305.16300)."""


def lines_after(tokenizer: TextTokenizer, lines: Sequence[str]) -> list[np.ndarray]:
    """Ids of each line where it stands below another one that ends with a full stop."""
    return pieces_after(tokenizer, ".", [f"\n{line}" for line in lines])


def in_noise(
    tokenizer: TextTokenizer, room: int, hidden: Sequence[str], generator: np.random.Generator, in_order: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Ids of repeated noise, a line for all of it, with sentences hidden at drawn places, and where each starts.

    in_order: the sentences keep their order. As much noise is taken as fits.
    """
    sentences = lines_after(tokenizer, hidden)
    (noise,) = lines_after(tokenizer, [" ".join(NOISE)])
    times = max(0, room - sum(map(len, sentences))) // len(noise)
    breaks = generator.integers(0, times + 1, len(hidden))
    breaks = np.sort(breaks) if in_order else breaks
    return hide(np.tile(noise, times), (breaks * len(noise)).tolist(), sentences)


def in_text(
    tokenizer: TextTokenizer, room: int, hidden: Sequence[str], text: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Ids of a text [n] from a drawn place on, repeated where it is too short, with sentences hidden at the last breaks
    before drawn places, and where each starts.
    """
    sentences = pieces_after(tokenizer, ".", [f" {one}" for one in hidden])
    own = np.resize(np.roll(text, -int(generator.integers(len(text)))), max(0, room - sum(map(len, sentences))))
    breaks = [break_before(own, int(place), tokenizer) for place in generator.integers(0, len(own) + 1, len(hidden))]
    return hide(own, breaks, sentences)


def among_needles(
    tokenizer: TextTokenizer,
    room: int,
    hidden: Sequence[str],
    draw: Callable[[int], list[str]],
    generator: np.random.Generator,
) -> tuple[np.ndarray, list[int]]:
    """Ids of many needles that `draw` makes, a line each, with sentences hidden among them, and where each starts."""
    sentences = lines_after(tokenizer, hidden)
    free = max(0, room - sum(map(len, sentences)))
    (one,) = lines_after(tokenizer, draw(1))
    others: list[np.ndarray] = []
    while (sizes := lengths_of(others)).sum() <= free:  # the first draw is nearly always enough
        others += lines_after(tokenizer, draw(2 * (free - int(sizes.sum())) // len(one) + 8))
    count = fitting(sizes, free)
    ends = np.concatenate([[0], np.cumsum(sizes[:count])])
    breaks = ends[generator.integers(0, count + 1, len(hidden))]
    return hide(joined(others[:count]), breaks.tolist(), sentences)
