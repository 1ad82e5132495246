"""Questions of a user's JSONL file: multiple choice or short answers, about text, an image or a video. Pure.

    {"question": "What does the bear do?", "choices": ["sleep", "eat"], "answer": "B", "video": "clips/bear.mp4"}
    {"question": "Who wrote it?", "answers": ["Shakespeare"], "context": "..."}

`answer` is the number of the right choice, from 0, or its letter. `image`, `video` (a URL, or a path beside the file)
and `context` may be absent; a line has one medium at most. Other fields are left alone, and `id` names the line in the
record of its answer. In: lines. Out: a `Question` of each, or why it cannot be used.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import BadData
from tokenization.media.kinds import MediaKind
from tokenization.readers.record import MAX_RECORD_BYTES, decode_text

LETTERS = string.ascii_uppercase
AskedFor = Literal["choice", "qa"]


@dataclass(frozen=True)
class Question:
    """A usable line. line: its number, from 1. answers: the accepted ones; of a choice, the right one alone.

    choices: empty where the answer is free. right: the number of the right choice. medium: its kind, and the URL or
    path that the line names.
    """

    line: int
    name: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    right: int = 0
    context: str = ""
    medium: tuple[MediaKind, str] | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    line: int
    reason: str


def read_questions(lines: Iterable[bytes | None], kind: AskedFor) -> tuple[list[Question], list[BadLine]]:
    """The questions of JSONL lines and the lines that are none, both in order; blank lines are neither.

    lines: without their line feed, None for one over the limit of a record.
    """
    questions: list[Question] = []
    bad: list[BadLine] = []
    for number, line in enumerate(lines, 1):
        if line is not None and not line.strip():
            continue
        try:
            questions.append(_question(number, _tree(line), kind))
        except BadData as error:
            bad.append(BadLine(number, str(error)))
    return questions, bad


def _tree(line: bytes | None) -> Mapping[str, Any]:
    if line is None:
        raise BadData(f"the line is longer than {MAX_RECORD_BYTES >> 20} MiB")
    try:
        tree = json.loads(decode_text(line))
    except (ValueError, RecursionError) as error:
        raise BadData(f"not JSON: {error}") from None
    if not isinstance(tree, Mapping):
        raise BadData(f"not an object with fields but {type(tree).__name__}")
    return tree


def _question(number: int, tree: Mapping[str, Any], kind: AskedFor) -> Question:
    media: list[tuple[MediaKind, str]] = [(one, _text(tree, one)) for one in ("image", "video") if tree.get(one)]
    if len(media) > 1:
        raise BadData("it names an image and a video; name one")
    context = _text(tree, "context") if tree.get("context") else ""
    choices = _texts(tree, "choices") if kind == "choice" else ()
    right = _right(tree, len(choices)) if kind == "choice" else 0
    answers = (choices[right],) if kind == "choice" else _texts(tree, "answers")
    name = str(tree.get("id", number))
    return Question(
        number, name, _text(tree, "question"), answers, choices, right, context, media[0] if media else None
    )


def _right(tree: Mapping[str, Any], count: int) -> int:
    if count < 2:
        raise BadData("choices holds one, and nothing is to be chosen; give two or more")
    if count > len(LETTERS):
        raise BadData(f"choices holds {count}, and there are {len(LETTERS)} letters to name them")
    answer = tree.get("answer")
    if isinstance(answer, str) and len(letter := answer.strip().strip("().").upper()) == 1 and letter in LETTERS:
        answer = LETTERS.index(letter)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise BadData(f"answer is {_shown(answer)}, neither the number of a choice, from 0, nor its letter")
    if not 0 <= answer < count:
        raise BadData(f"answer is {_shown(tree['answer'])}, and there are {count} choices")
    return answer


def _texts(tree: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = tree.get(key)
    if not isinstance(given, list) or not given:
        raise BadData(f"{key} is {_shown(given)}, not a list of texts")
    return tuple(_checked(one, f"one of {key}") for one in given)


def _text(tree: Mapping[str, Any], key: str) -> str:
    return _checked(tree.get(key), key)


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadData(f"{what} is {_shown(value)}, not text")
    if "\0" in value:
        raise BadData(f"{what} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadData(f"{what} holds a lone surrogate at character {error.start}") from None
    return value.strip()


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return "absent" if value is None else shown if len(shown) <= 40 else f"{shown[:40]}.."
