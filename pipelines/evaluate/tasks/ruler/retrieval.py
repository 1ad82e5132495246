"""RULER's eight tasks of retrieval: values hidden under keys in three kinds of text, of which some are asked for. Pure.

task               text      keys x values   asked    a value is
niah_single_1      noise     1 x 1           1 key    a number
niah_single_2      real      1 x 1           1 key    a number
niah_single_3      real      1 x 1           1 key    a UUID
niah_multikey_1    real      4 x 1           1 key    a number
niah_multikey_2    needles   all x 1         1 key    a number
niah_multikey_3    needles   all x 1         1 key    a UUID, and so is a key
niah_multivalue    real      1 x 4           1 key    a number
niah_multiquery    real      4 x 1           4 keys   a number
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.evaluate.tasks.filling import pieces_after
from pipelines.evaluate.tasks.made_words import draw_numbers, draw_uuids, draw_words
from pipelines.evaluate.tasks.ruler.example import Example, Frame
from pipelines.evaluate.tasks.ruler.haystacks import among_needles, in_noise, in_text
from tokenization.text.tokenizer import TextTokenizer

ANSWER_TOKENS = 128
NUMBER_DIGITS = 7


@dataclass(frozen=True)
class Retrieval:
    """A row of the table above."""

    text: Literal["noise", "real", "needles"]
    keys: int = 1
    values: int = 1
    asked: int = 1
    uuid_keys: bool = False
    uuid_values: bool = False


RETRIEVALS = {
    "niah_single_1": Retrieval("noise"),
    "niah_single_2": Retrieval("real"),
    "niah_single_3": Retrieval("real", uuid_values=True),
    "niah_multikey_1": Retrieval("real", keys=4),
    "niah_multikey_2": Retrieval("needles"),
    "niah_multikey_3": Retrieval("needles", uuid_keys=True, uuid_values=True),
    "niah_multivalue": Retrieval("real", values=4),
    "niah_multiquery": Retrieval("real", keys=4, asked=4),
}


def retrieval_example(
    task: Retrieval, context: int, text: np.ndarray, tokenizer: TextTokenizer, generator: np.random.Generator
) -> Example:
    """One example. text: ids of real text [n], which only the tasks in real text take.

    Raises UserError where the context has no room.
    """
    keys = _draw_keys(task, generator)(task.keys)
    values = _draw_values(task, generator)(task.keys * task.values)
    of_key = {key: values[number * task.values :][: task.values] for number, key in enumerate(keys)}
    hidden = [_sentence(task, key, value) for key in keys for value in of_key[key]]
    asked = [keys[number] for number in generator.permutation(task.keys)[: task.asked]]
    frame = Frame.of(tokenizer, *_words_around(task, asked), context, ANSWER_TOKENS)
    sentences = pieces_after(tokenizer, ".", [f"\n{one}" for one in hidden])
    room = frame.room(needed=sum(map(len, sentences)) + 1)
    if task.text == "noise":
        filled, places = in_noise(tokenizer, room, hidden, generator)
    elif task.text == "real":
        filled, places = in_text(tokenizer, room, hidden, text, generator)
    else:
        filled, places = among_needles(tokenizer, room, hidden, _other_needles(task, keys, generator), generator)
    return frame.example(filled, [value for key in asked for value in of_key[key]], places)


def _draw_keys(task: Retrieval, generator: np.random.Generator) -> Callable[[int], list[str]]:
    return lambda count: draw_uuids(count, generator) if task.uuid_keys else draw_words(count, generator)


def _draw_values(task: Retrieval, generator: np.random.Generator) -> Callable[[int], list[str]]:
    return lambda count: (
        draw_uuids(count, generator) if task.uuid_values else draw_numbers(count, NUMBER_DIGITS, generator)
    )


def _other_needles(task: Retrieval, keys: Sequence[str], generator: np.random.Generator) -> Callable[[int], list[str]]:
    """Needles under keys that were not used yet."""
    used = set(keys)
    draw_keys, draw_values = _draw_keys(task, generator), _draw_values(task, generator)

    def draw(count: int) -> list[str]:
        fresh = [key for key in draw_keys(count) if key not in used]
        used.update(fresh)
        return [_sentence(task, key, value) for key, value in zip(fresh, draw_values(len(fresh)))]

    return draw


def _kind(task: Retrieval) -> str:
    return "code" if task.uuid_values else "number"


def _sentence(task: Retrieval, key: str, value: str) -> str:
    return f"The special magic {_kind(task)} of {key} is: {value}."


def _words_around(task: Retrieval, asked: Sequence[str]) -> tuple[str, str]:
    """The instruction before the text and the question behind it, which begins its answer."""
    many = task.values > 1 or task.asked > 1
    kind, verb = (f"{_kind(task)}s", "are") if many else (_kind(task), "is")
    *others, last = asked
    named = f"{', '.join(others)} and {last}" if others else last
    instruction = f"Special magic {_kind(task)}s are hidden in this text. Keep them in mind for a question at its end."
    every = "all " if task.values > 1 else ""
    what = f"{every}the special magic {kind} of {named}"
    return instruction, f"Question: What {verb} {what}?\nAnswer: {what[0].upper()}{what[1:]} {verb}:"
