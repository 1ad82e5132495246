"""Questions with short answers about text, images or videos: greedy answers, by exact match, F1, and containment.

An answer ends at EOS or at its first line. The measures are SQuAD's (arXiv 1606.05250), after its normalisation; that
an accepted answer stands in the model's is what is fair to a model that answers in sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate.asking import asked_together, greedy_answers
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.question_cells import (
    Asked,
    asked_in,
    check_questions,
    counted,
    left_out,
    mean_of,
    question_cells,
    without_answers,
)
from pipelines.evaluate.record import Row
from pipelines.evaluate.tasks.judging import contains, exact_match, word_f1
from pipelines.evaluate.tasks.question_prompts import TEMPLATE
from pipelines.recipe.evaluation_tasks import ShortAnswers as Settings

TITLE = "Short answers"


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    return None if job.settings.qa else "evaluate.qa is not there; set qa.NAME.file"


def check(job: EvaluateJob) -> None:
    """Every file has questions that the model can be asked."""
    for name, settings in _settings(job).items():
        check_questions(job, "qa", name, settings.file)


def cells(job: EvaluateJob) -> list[Cell]:
    """Some questions of one file each."""
    return [cell for name, settings in _settings(job).items() for cell in question_cells(job, "qa", name, settings)]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Answer every question, all of one medium behind one prefill."""
    from model.llama.llama import inference

    settings, tokenizer = _settings(job)[cell.arguments["name"]], job.subject.tokenizer()
    answers: list[dict[str, Any]] = []
    unasked: list[Asked] = []
    model = job.subject.model(job.group)
    for asked in asked_in(job, cell, settings, settings.template or TEMPLATE):
        unasked.append(Asked(bad=asked.bad))
        if not asked.prompts:
            continue
        with inference(model):
            prompts = [prompt.tokens for prompt in asked.prompts]
            decoder = asked_together(model, prompts, settings.answer_tokens, job.group)
            ids = greedy_answers(decoder, job.vocabulary, settings.answer_tokens)
            del decoder  # before the next one is filled
        for question, own in zip(asked.questions, ids):
            answer = first_line(tokenizer.decode([id for id in own if id < tokenizer.size]))
            answers.append(
                {
                    "line": question.line,
                    "name": question.name,
                    "answer": answer,
                    "exact": exact_match(answer, question.answers),
                    "f1": word_f1(answer, question.answers),
                    "contained": contains(answer, question.answers),
                }
            )
    return {"name": cell.arguments["name"], "answers": answers, "left_out": left_out(unasked)}


def first_line(answer: str) -> str:
    """The first line of an answer that is not blank."""
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a file: means over its answers, which are in cells."""
    found: list[Row] = []
    for name, settings in _settings(job).items():
        own = [result for result in results.values() if result["name"] == name]
        answers = [answer for result in own for answer in result["answers"]]
        if own:
            figures = {key: mean_of(answers, key) for key in ("exact", "f1", "contained")}
            found.append({**counted(job, "qa", name, settings, own), **figures})
    return found


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """Of the file with the fewest right answers."""
    sentences = []
    for row in rows:
        if row["exact"] is None:
            sentences.append(without_answers(row))
            continue
        sentences.append(
            f"{row['name']}: {row['exact']:.1%} of {row['asked']} answers match, {row['contained']:.1%} hold an "
            f"accepted one, the words' F1 is {row['f1']:.1%}."
        )
    worst = min(row["f1"] or 0.0 for row in rows)
    grade = "good" if worst >= 0.6 else "fair" if worst >= 0.2 else "bad"
    return grade, f"Short answers: {' '.join(sentences)}"


def _settings(job: EvaluateJob) -> dict[str, Settings]:
    return job.settings.qa or {}
