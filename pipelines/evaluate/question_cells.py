"""What multiple choice and short answers have in common: files of questions, their cells, and prompts by medium.

In: the settings of one file of questions. Out: its questions, cells of some of them, and in a cell the prompts of all
that are about one medium or one text, which are asked behind one prefill. What cannot be asked is left out, with its
line and the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.evaluate.asking import TOGETHER, slices
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.named_files import NamedFile, named_file
from pipelines.evaluate.question_media import question_codes
from pipelines.evaluate.tasks.question_lines import AskedFor, BadLine, Question, read_questions
from pipelines.evaluate.tasks.question_prompts import QuestionPrompt, question_prompt
from pipelines.recipe.evaluation_tasks import Questions as Settings
from storage.errors import BadData, UserError
from tokenization.media.frame_sampling import uniform_sample

SHOWN_BAD = 20
"""Lines that cannot be used, of which a row names so many."""
_TEXT_TOKENS = 2048  # that a question about a medium is taken to have, where cells are cut


@dataclass
class Asked:
    """Questions of one medium or text with their prompts, and those that cannot be asked."""

    questions: list[Question] = field(default_factory=list)
    prompts: list[QuestionPrompt] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


def questions_of(job: EvaluateJob, task: AskedFor, name: str, file: str) -> tuple[list[Question], list[BadLine]]:
    """All questions of a file and the lines that are none. Raises UserError where there is no such file."""
    key = f"evaluate.{task}.{name}.file"
    return _read(named_file(key, file, job.storage), task)


def check_questions(job: EvaluateJob, task: AskedFor, name: str, file: str) -> None:
    """Raise UserError where no line can be used, or the questions are about media and the model has no codec."""
    questions, bad = questions_of(job, task, name, file)
    key = f"evaluate.{task}.{name}.file"
    if not questions:
        why = f"line {bad[0].line}: {bad[0].reason}" if bad else "it is empty"
        raise UserError(f"{key}: no line of {file} can be used ({why}); docs/evaluation.md says what a line has")
    if not job.subject.has_codec and all(one.medium for one in questions):
        raise UserError(f"{key}: all questions are about media, and the model has no codec of frames; name others")


def question_cells(job: EvaluateJob, task: AskedFor, name: str, settings: Settings) -> list[Cell]:
    """Some of a file's questions each, consecutive ones of those that are asked."""
    count = len(_chosen(job, task, name, settings))
    frame = 257  # of the released VQGAN; another cuts the cells a little finer or coarser
    about_media = any(one.medium for one in questions_of(job, task, name, settings.file)[0])
    tokens = _TEXT_TOKENS + (settings.frames * frame if about_media else 0)
    return [
        Cell(f"{task}-{name}-{start}", task, {"name": name, "start": start, "end": end})
        for start, end in slices(count, tokens)
    ]


def asked_in(job: EvaluateJob, cell: Cell, settings: Settings, template: str, letters: bool = False) -> Iterator[Asked]:
    """The questions of a cell, those that are about one medium and text together, with their prompts. Collective.

    Of one medium at most `TOGETHER` are asked at once. A prompt that is longer than the model's context is left out.
    """
    name, start, end = (cell.arguments[key] for key in ("name", "start", "end"))
    task: AskedFor = "choice" if cell.task == "choice" else "qa"
    file = named_file(f"evaluate.{task}.{name}.file", settings.file, job.storage)
    by_medium: dict[Any, list[Question]] = {}
    for question in _chosen(job, task, name, settings)[start:end]:
        by_medium.setdefault((question.medium, question.context), []).append(question)
    longest = job.subject.model(job.group).config.max_position_embeddings
    for questions in by_medium.values():
        asked = Asked()
        try:
            if questions[0].medium and not job.subject.has_codec:
                raise BadData("it is about a medium, and the model has no codec of frames")
            codes = question_codes(job, file, questions[0], settings.frames, settings.media_from)
        except BadData as error:
            asked.bad = [BadLine(question.line, str(error)) for question in questions]
            yield asked
            continue
        for question in questions:
            prompt = question_prompt(question, template, job.subject.tokenizer(), job.vocabulary, codes, letters)
            tokens = len(prompt.tokens) + max(map(len, prompt.choices), default=0)
            if tokens > longest:
                reason = f"its {tokens:,} tokens are more than the model's {longest:,}; lower frames"
                asked.bad.append(BadLine(question.line, reason))
                continue
            asked.questions.append(question)
            asked.prompts.append(prompt)
            if len(asked.prompts) == TOGETHER:
                yield asked
                asked = Asked()
        if asked.prompts or asked.bad:
            yield asked


def left_out(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """The lines that could not be asked, as plain JSON."""
    return [{"line": bad.line, "reason": bad.reason} for one in asked for bad in one.bad]


def counted(
    job: EvaluateJob, task: AskedFor, name: str, settings: Settings, results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a row says of a file beside its figures: how many were asked, of how many; and lines that cannot be used."""
    questions, unreadable = questions_of(job, task, name, settings.file)
    bad: list[dict[str, Any]] = [{"line": one.line, "reason": one.reason} for one in unreadable]
    bad += [one for result in results for one in result["left_out"]]
    bad.sort(key=lambda one: one["line"])
    return {
        "name": name,
        "asked": sum(len(result["answers"]) for result in results),
        "of_questions": len(questions),
        "left_out": len(bad),
        "reasons": bad[:SHOWN_BAD],
    }


def mean_of(answers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure over the answers; None without any."""
    return float(np.mean([answer[key] for answer in answers])) if answers else None


def without_answers(row: Mapping[str, Any]) -> str:
    """The sentence about a file of whose questions none could be asked."""
    reasons = row["reasons"]
    why = f" ({reasons[0]['reason']})" if reasons else ""
    return f"{row['name']}: none of its {row['of_questions']} questions could be asked{why}."


def _chosen(job: EvaluateJob, task: AskedFor, name: str, settings: Settings) -> list[Question]:
    questions, _ = questions_of(job, task, name, settings.file)
    return [questions[number] for number in uniform_sample(len(questions), settings.at_most or len(questions))]


@functools.lru_cache(maxsize=8)
def _read(file: NamedFile, task: AskedFor) -> tuple[list[Question], list[BadLine]]:
    return read_questions(file.lines(), task)
