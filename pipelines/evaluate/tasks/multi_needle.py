"""Several needles in one haystack, some of which are asked for together: the share of the asked numbers in the answer.

As in LWM's evaluation (arXiv 2402.08268): N needles at drawn depths, R of them asked for in one question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluate.asking import asked_together, batches, greedy_answers
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.haystack import haystack, lacks_text
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row
from pipelines.evaluate.tasks.needle_prompts import answer_buffer, build_prompt, draw_hidden, found
from pipelines.recipe.evaluation_tasks import MultiNeedle as Settings
from pipelines.report.numbers import context_name
from storage.errors import UserError

TITLE = "Several needles"
ANSWER_TOKENS = 24
"""Of one asked number."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.settings.multi_needle is None:
        return "evaluate.multi_needle is not there; set multi_needle.contexts"
    return lacks_text(job)


def check(job: EvaluateJob) -> None:
    """Every context holds what is hidden in it, the question, and an answer about all that is asked for."""
    settings = _settings(job)
    asked = max(case.asked for case in settings.cases)
    tokenizer = job.subject.tokenizer()
    for context in settings.contexts:
        if answer_buffer(context) < ANSWER_TOKENS * asked:
            raise UserError(
                f"evaluate.multi_needle.contexts: {context} tokens keep {answer_buffer(context)} for the answer, and "
                f"{asked} numbers take {ANSWER_TOKENS * asked}; use a longer context, or ask for fewer"
            )
        for number, case in enumerate(settings.cases):
            hidden, wanted = draw_hidden(case.hidden, case.asked, _generator(job, 0, number))
            build_prompt(np.zeros(1, np.int32), [(one, 0.0) for one, _ in hidden], wanted, context, tokenizer)


def cells(job: EvaluateJob) -> list[Cell]:
    """A context and a round each, with all cases of needles."""
    settings = _settings(job)
    return [
        Cell(f"multi-needle-{context}-{number}", "multi-needle", {"context": context, "round": number})
        for context in settings.contexts
        for number in range(settings.rounds)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Ask the question of each case, all in the same text."""
    from model.llama.llama import inference

    settings, context, number = _settings(job), cell.arguments["context"], cell.arguments["round"]
    tokenizer = job.subject.tokenizer()
    text = np.roll(haystack(job, context * settings.rounds), -number * context)
    drawn = [
        draw_hidden(case.hidden, case.asked, _generator(job, number, place))
        for place, case in enumerate(settings.cases)
    ]
    prompts = [build_prompt(text, hidden, asked, context, tokenizer).tokens for hidden, asked in drawn]
    answers: list[dict[str, Any]] = []
    model = job.subject.model(job.group)
    with inference(model):
        for batch in batches(list(map(len, prompts)), max(settings.contexts)):
            most = max(ANSWER_TOKENS * len(drawn[one][1]) for one in batch)
            decoder = asked_together(model, [prompts[one] for one in batch], most, job.group)
            for one, ids in zip(batch, greedy_answers(decoder, job.vocabulary, most)):
                hidden, asked = drawn[one]
                answer = tokenizer.decode([id for id in ids[: ANSWER_TOKENS * len(asked)] if id < tokenizer.size])
                answers.append(
                    {
                        "hidden": len(hidden),
                        "asked": [needle.number for needle in asked],
                        "depths": [depth for needle, depth in hidden if needle in asked],
                        "answer": answer,
                        "found": found(answer, asked),
                    }
                )
            del decoder  # before the next one is filled
    return {"context": context, "round": number, "answers": answers}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a context and a case: the mean share over the rounds that were measured, and that of answers all right."""
    settings = _settings(job)
    found_rows: list[Row] = []
    for context in settings.contexts:
        own = [result for result in results.values() if result["context"] == context]
        for place, case in enumerate(settings.cases):
            answers = [{"round": result["round"], **result["answers"][place]} for result in own]
            if answers:
                shares = [answer["found"] for answer in answers]
                found_rows.append(
                    {
                        "part": f"multi-needle-{context}",
                        "context": context,
                        "hidden": case.hidden,
                        "asked": case.asked,
                        "rounds": len(answers),
                        "accuracy": float(np.mean(shares)),
                        "all_right": float(np.mean([share == 1 for share in shares])),
                        "answers": answers,
                    }
                )
    return found_rows


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """Of the mean over all contexts and cases."""
    accuracy = float(np.mean([row["accuracy"] for row in rows]))
    worst = min(rows, key=lambda row: row["accuracy"])
    rounds = sum(row["rounds"] for row in rows)
    grade = "good" if accuracy >= 0.9 and worst["accuracy"] >= 0.8 else "fair" if accuracy >= 0.5 else "bad"
    return grade, (
        f"Several needles: {accuracy:.0%} of the asked numbers are found over {rounds} questions; the fewest, "
        f"{worst['accuracy']:.0%}, of {worst['asked']} asked among {worst['hidden']} hidden in "
        f"{context_name(worst['context'])}."
    )


def _settings(job: EvaluateJob) -> Settings:
    assert job.settings.multi_needle is not None
    return job.settings.multi_needle


def _generator(job: EvaluateJob, number: int, case: int) -> np.random.Generator:
    return np.random.default_rng([job.seed, number, case])
