"""The prompt of a question by a template, and what may follow it: ids laid out as documents are in training. Pure.

A template is text with places for what a question has: `{vision}`, where the frames stand between `<vision>` and
`</vision>`; `{context}`, `{question}` and, of several choices, `{choices}`, one a line behind its letter. The text
before the frames and that behind them are encoded each by itself, as the fields of a document are.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from pipelines.evaluate.tasks.filling import pieces_after
from pipelines.evaluate.tasks.question_lines import LETTERS, Question
from pipelines.inference.prompt import Part, prompt_ids
from storage.errors import UserError
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

PLACES = ("vision", "context", "question", "choices")
TEMPLATE = "{vision}{context}Question: {question}\nAnswer:"
LETTER_TEMPLATE = "{vision}{context}Question: {question}\n{choices}\nAnswer:"
_PLACE = "\0"  # of the frames, which no question holds
_TAIL = 64  # characters of the prompt behind which a choice is encoded: more than a word, across which nothing merges


@dataclass(frozen=True)
class QuestionPrompt:
    """tokens: int32 [L], BOS to where the answer begins. choices: ids of each choice behind it, int32 each."""

    tokens: np.ndarray
    choices: tuple[np.ndarray, ...] = ()


def check_template(key: str, template: str, letters: bool) -> None:
    """Raise UserError on a template without the question, with a place that there is not, or that differs in letters.

    letters: whether a choice is answered by its letter, and thus has to be listed.
    """
    try:
        named = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{{{ for a brace") from None
    if unknown := [name for name in named if name not in PLACES]:
        raise UserError(f"{key}: there is no {{{unknown[0]}}}; use {', '.join(f'{{{name}}}' for name in PLACES)}")
    if "question" not in named or named.count("vision") > 1:
        raise UserError(f"{key}: a template has {{question}}, and {{vision}} once at most; change it")
    if letters and "choices" not in named:
        raise UserError(f"{key}: a choice by its letter has to be listed; add {{choices}}, or drop letters")
    if not template.split("{vision}")[-1].strip():
        raise UserError(f"{key}: nothing stands behind {{vision}}, where the answer begins; put the question there")


def question_prompt(
    question: Question,
    template: str,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
    codes: np.ndarray | None = None,
    letters: bool = False,
) -> QuestionPrompt:
    """The prompt of a question. codes: [frames, codes_per_frame] of its medium; None without one.

    letters: the choices are answered by their letters, else by their whole text.
    """
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))
    fields = {
        "context": f"{question.context}\n\n" if question.context else "",
        "question": question.text,
        "choices": listed,
    }
    before, place, text = template.format(vision=_PLACE, **fields).partition(_PLACE)
    if not place:
        before, text = "", before
    parts: list[Part] = [*([before] if before else []), *([] if codes is None else [codes]), text]
    answers = LETTERS[: len(question.choices)] if letters else question.choices
    end = text[-_TAIL:]
    space = "" if end[-1:].isspace() else " "
    choices = pieces_after(tokenizer, end, [f"{space}{answer}" for answer in answers]) if answers else []
    return QuestionPrompt(prompt_ids(parts, tokenizer, vocabulary), tuple(choices))
