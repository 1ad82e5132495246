"""What every RULER task makes: a prompt that with its answer fits a context, and how the answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluate.tasks.filling import joined, pieces_after, too_small
from pipelines.evaluate.tasks.judging import any_of, share_of
from tokenization.text.tokenizer import TextTokenizer

CONTEXTS = "evaluate.ruler.contexts"
"""The recipe's key, for errors."""


@dataclass(frozen=True)
class Example:
    """tokens: int32 [L], BOS to the begun answer. answers: what it has to name. answer_tokens: the most it may take.

    one_is_enough: whether any of the answers is right (they are ways to say one thing), or each counts for its share.
    places: where hidden sentences start in the tokens, in the order in which they were made.
    """

    tokens: np.ndarray
    answers: tuple[str, ...]
    answer_tokens: int
    one_is_enough: bool = False
    places: tuple[int, ...] = ()

    def score(self, answer: str) -> float:
        """0 to 1, by the paper's string match."""
        return any_of(answer, self.answers) if self.one_is_enough else share_of(answer, self.answers)


@dataclass(frozen=True)
class Frame:
    """What stands around the text that fills a context. start: ids with BOS. end: the question and the begun answer."""

    start: np.ndarray
    end: np.ndarray
    context: int
    answer_tokens: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer, instruction: str, question: str, context: int, answer_tokens: int) -> Frame:
        """Around a text whose last sentence ends with a full stop."""
        start = joined([np.array([tokenizer.bos_id]), tokenizer.encode(instruction)])
        (end,) = pieces_after(tokenizer, ".", [f"\n\n{question}"])
        return cls(start, end, context, answer_tokens)

    def room(self, needed: int) -> int:
        """Tokens for the text. Raises UserError where they are less than needed."""
        room = self.context - self.answer_tokens - len(self.start) - len(self.end)
        if room < needed:
            raise too_small(CONTEXTS, self.context, needed - room)
        return room

    def example(
        self, text: np.ndarray, answers: Sequence[str], places: Sequence[int] = (), one_is_enough: bool = False
    ) -> Example:
        """The example with this text between. places: in the text."""
        tokens = joined([self.start, text, self.end])
        assert len(tokens) + self.answer_tokens <= self.context
        moved = tuple(len(self.start) + place for place in places)
        return Example(tokens, tuple(answers), self.answer_tokens, one_is_enough, moved)
