"""RULER's two question-answering tasks: the paragraphs that answer a question among as many others as fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.evaluate.tasks.filling import fitting, joined, lengths_of, pieces_after
from pipelines.evaluate.tasks.ruler.documents import Documents
from pipelines.evaluate.tasks.ruler.example import Example, Frame
from tokenization.text.tokenizer import TextTokenizer

ANSWER_TOKENS = 32
_INSTRUCTION = "Answer the question at the end from these documents, in as few words as it takes."
_AT_ONCE = 512  # paragraphs that are encoded


def documents_example(
    documents: Documents, number: int, context: int, tokenizer: TextTokenizer, generator: np.random.Generator
) -> Example:
    """One example, about the number-th question. Raises UserError where the context has no room for what answers it."""
    asked = documents.questions[number]
    question = f"Question: {asked.question}\nAnswer:"
    frame = Frame.of(tokenizer, _INSTRUCTION, question, context, ANSWER_TOKENS)
    pieces = _shown(tokenizer, asked.paragraphs)
    n_needed = len(pieces)
    headings = _headings(tokenizer, 0, n_needed)
    used = sum(map(len, pieces + headings))
    room = frame.room(used) - used
    own = {*asked.paragraphs, *asked.near}
    drawn = (documents.paragraphs[one] for one in generator.permutation(len(documents.paragraphs)))
    others = [*asked.near, *(text for text in drawn if text not in own)]
    for start in range(0, len(others), _AT_ONCE):
        shown = _shown(tokenizer, others[start : start + _AT_ONCE])
        more = _headings(tokenizer, len(pieces), len(shown))
        sizes = lengths_of(shown) + lengths_of(more)
        count = fitting(sizes, room)
        pieces += shown[:count]
        headings += more[:count]
        room -= int(sizes[:count].sum())
        if count < len(shown):
            break
    order = generator.permutation(len(pieces))
    parts = [part for heading, one in zip(headings, order) for part in (heading, pieces[one])]
    ends = np.cumsum([0, *map(len, parts)])
    places = [int(ends[2 * int(np.flatnonzero(order == one)[0])]) for one in range(n_needed)]
    return frame.example(joined(parts), asked.answers, places, one_is_enough=True)


def _headings(tokenizer: TextTokenizer, after: int, count: int) -> list[np.ndarray]:
    return pieces_after(tokenizer, ".", [f"\n\nDocument {after + number}:" for number in range(1, count + 1)])


def _shown(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return pieces_after(tokenizer, ":", [f"\n{text}" for text in texts])
