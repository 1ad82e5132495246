"""Multiple choice about text, images or videos: the likeliest answer counts, by its sum and by its mean over tokens.

Each choice stands behind the prompt as the answer, and its log-probability is summed over its tokens; the mean over
them keeps a long choice from losing for its length. With `letters` the choices are listed in the prompt and their
letters are scored, as benchmarks of videos do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluate.asking import asked_together
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
from pipelines.evaluate.tasks.question_prompts import LETTER_TEMPLATE, TEMPLATE
from pipelines.recipe.evaluation_tasks import Choice as Settings

TITLE = "Multiple choice"


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    return None if job.settings.choice else "evaluate.choice is not there; set choice.NAME.file"


def check(job: EvaluateJob) -> None:
    """Every file has questions that the model can be asked."""
    for name, settings in _settings(job).items():
        check_questions(job, "choice", name, settings.file)


def cells(job: EvaluateJob) -> list[Cell]:
    """Some questions of one file each."""
    return [cell for name, settings in _settings(job).items() for cell in question_cells(job, "choice", name, settings)]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Score the choices of every question, all of one medium behind one prefill."""
    from model.inference.answers import score_answers
    from model.llama.llama import inference

    settings = _settings(job)[cell.arguments["name"]]
    template = settings.template or (LETTER_TEMPLATE if settings.letters else TEMPLATE)
    answers: list[dict[str, Any]] = []
    unasked: list[Asked] = []
    model = job.subject.model(job.group)
    for asked in asked_in(job, cell, settings, template, settings.letters):
        unasked.append(Asked(bad=asked.bad))
        if not asked.prompts:
            continue
        with inference(model):
            decoder = asked_together(model, [prompt.tokens for prompt in asked.prompts], group=job.group)
            scores = score_answers(decoder, [prompt.choices for prompt in asked.prompts])
            del decoder  # before the next one is filled
        for question, score in zip(asked.questions, scores):
            by_sum, by_mean = int(np.argmax(score.log_probability)), int(np.argmax(score.per_token))
            answers.append(
                {
                    "line": question.line,
                    "name": question.name,
                    "right": question.right,
                    "chosen": by_sum,
                    "chosen_by_mean": by_mean,
                    "log_probability": score.log_probability.tolist(),
                    "tokens": score.tokens.tolist(),
                    "is_right": by_sum == question.right,
                    "is_right_by_mean": by_mean == question.right,
                    "chance": 1 / len(question.choices),
                }
            )
    return {"name": cell.arguments["name"], "answers": answers, "left_out": left_out(unasked)}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a file: accuracy by the sum and by the mean over tokens, and what a guess gets; answers are in cells."""
    found: list[Row] = []
    for name, settings in _settings(job).items():
        own = [result for result in results.values() if result["name"] == name]
        answers = [answer for result in own for answer in result["answers"]]
        if own:
            figures: dict[str, Any] = {
                "accuracy": mean_of(answers, "is_right"),
                "accuracy_by_mean": mean_of(answers, "is_right_by_mean"),
                "chance": mean_of(answers, "chance"),
            }
            found.append({**counted(job, "choice", name, settings, own), "letters": settings.letters, **figures})
    return found


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """Of the file with the worst answer beside chance; `verdict_of_choice` says how far above chance counts."""
    graded = [verdict_of_choice(row) for row in rows]
    order = ("bad", "fair", "good")
    grade = min((one for one, _ in graded), key=order.index)
    return grade, f"Multiple choice: {' '.join(text for _, text in graded)}"


def verdict_of_choice(row: Row) -> tuple[str, str]:
    """Grade and sentence of one row: what is not two standard errors above a guess has learnt nothing."""
    if row["accuracy"] is None:
        return "bad", without_answers(row)
    accuracy, chance, asked = row["accuracy"], row["chance"], row["asked"]
    error = (chance * (1 - chance) / asked) ** 0.5
    above = accuracy > chance + 2 * error
    grade = "bad" if not above else "good" if accuracy >= (1 + chance) / 2 else "fair"
    beside = "a guess gets" if above else "within two standard errors of, or below, the"
    guess = f"{beside} {chance:.1%}{'' if above else ' of a guess'}"
    return grade, (
        f"{row['name']}: {accuracy:.1%} of {asked} questions are right ({row['accuracy_by_mean']:.1%} by the mean over "
        f"tokens), {guess}."
    )


def _settings(job: EvaluateJob) -> dict[str, Settings]:
    return job.settings.choice or {}
