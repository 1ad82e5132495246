"""RULER's tracing of variables: a value goes from variable to variable, and all that hold it are asked for. Pure.

One chain of five variables, four times passed on, hidden in order in a text of repeated noise, after a short solved
example with names of its own.
"""

from __future__ import annotations

import numpy as np

from pipelines.evaluate.tasks.filling import pieces_after
from pipelines.evaluate.tasks.made_words import draw_codes, draw_numbers
from pipelines.evaluate.tasks.ruler.example import Example, Frame
from pipelines.evaluate.tasks.ruler.haystacks import NOISE, in_noise
from tokenization.text.tokenizer import TextTokenizer

ANSWER_TOKENS = 30
HOPS = 4
_INSTRUCTION = "Some variables in this text are assigned a value or the value of another variable. Trace them."


def tracing_example(context: int, tokenizer: TextTokenizer, generator: np.random.Generator) -> Example:
    """One example. Raises UserError where the context has no room."""
    names = [name.upper() for name in draw_codes(2 * (HOPS + 1), 5, generator)]
    shown, asked = names[: HOPS + 1], names[HOPS + 1 :]
    shown_value, value = draw_numbers(2, 5, generator)
    solved = "\n".join(
        [_INSTRUCTION, *_chain(shown, shown_value), " ".join(NOISE), "", f"{_question(shown_value)} {' '.join(shown)}."]
    )
    frame = Frame.of(tokenizer, f"{solved}\n\n{_INSTRUCTION}", _question(value), context, ANSWER_TOKENS)
    hidden = _chain(asked, value)
    room = frame.room(sum(map(len, pieces_after(tokenizer, ".", [f"\n{one}" for one in hidden]))) + 1)
    text, places = in_noise(tokenizer, room, hidden, generator, in_order=True)
    return frame.example(text, asked, places)


def _chain(names: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {source}." for name, source in zip(names, sources)]


def _question(value: str) -> str:
    return f"Question: Which {HOPS + 1} variables hold the value {value}?\nAnswer: The variables that hold {value} are:"
