"""RULER (arXiv 2404.06654) on held-out text and made words: its mean over the tasks by context, and how far it reaches.

The tasks, their sizes and their scores are the paper's; `pipelines.evaluate.tasks.ruler` makes the examples. What
differs is in `docs/evaluation.md`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluate.asking import asked_together, batches, greedy_answers, slices
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.haystack import haystack, lacks_text
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.named_files import NamedFile, named_file
from pipelines.evaluate.record import Row
from pipelines.evaluate.tasks.ruler.documents import Documents, read_documents
from pipelines.evaluate.tasks.ruler.examples import (
    GENERATED,
    QUESTIONS,
    THRESHOLD,
    effective_context,
    make_example,
)
from pipelines.evaluate.tasks.ruler.retrieval import RETRIEVALS
from pipelines.recipe.evaluation_tasks import Ruler as Settings
from pipelines.report.numbers import context_name
from storage.errors import BadData, UserError

TITLE = "RULER"
_SLACK = 64
"""Tokens by which an example may need more than the one that was tried."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.settings.ruler is None:
        return "evaluate.ruler is not there; set ruler.contexts"
    if any(task in RETRIEVALS and RETRIEVALS[task].text == "real" for task in job.settings.ruler.tasks):
        return lacks_text(job)
    return None


def check(job: EvaluateJob) -> None:
    """Every task fits every context, and the files of questions are of their forms."""
    settings = _settings(job)
    tokenizer = job.subject.tokenizer()
    text = tokenizer.encode("So it is. " * 8)
    for task in _tasks(settings):
        if task in QUESTIONS:
            _documents(job, task)  # of whose questions one may fit where another does not
        else:
            make_example(task, min(settings.contexts) - _SLACK, 0, job.seed, text, tokenizer)


def cells(job: EvaluateJob) -> list[Cell]:
    """Some examples of one task at one context each."""
    settings = _settings(job)
    return [
        Cell(
            f"ruler-{context}-{task}-{start}",
            "ruler",
            {"context": context, "task": task, "start": start, "end": end},
        )
        for context in settings.contexts
        for task in _tasks(settings)
        for start, end in slices(settings.examples, context)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Make the examples and answer them greedily, as many at once as fill the longest context."""
    from model.llama.llama import inference

    settings = _settings(job)
    task, context, start, end = (cell.arguments[key] for key in ("task", "context", "start", "end"))
    tokenizer = job.subject.tokenizer()
    needs_text = task in RETRIEVALS and RETRIEVALS[task].text == "real"
    text = haystack(job, 8 * context) if needs_text else np.zeros(0, np.int32)
    documents = _documents(job, task)
    examples = [
        make_example(task, context, number, job.seed, text, tokenizer, documents) for number in range(start, end)
    ]
    answers: list[dict[str, Any]] = []
    model = job.subject.model(job.group)
    with inference(model):
        for batch in batches([len(example.tokens) for example in examples], max(settings.contexts)):
            most = examples[0].answer_tokens
            decoder = asked_together(model, [examples[one].tokens for one in batch], most, job.group)
            for one, ids in zip(batch, greedy_answers(decoder, job.vocabulary, most)):
                answer = tokenizer.decode([id for id in ids if id < tokenizer.size])
                wanted = list(examples[one].answers)
                answers.append({"wanted": wanted, "answer": answer, "score": examples[one].score(answer)})
            del decoder  # before the next one is filled
    return {"context": context, "task": task, "answers": answers}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a context with the score of each task, 0 to 1, None for one that was not measured, and their mean.

    is_whole: whether all tasks of the recipe were measured there; without, a mean does not count as reached.
    """
    settings = _settings(job)
    found_rows: list[Row] = []
    for context in settings.contexts:
        scores: dict[str, float | None] = {}
        asked = 0
        for task in _tasks(settings):
            answers = [
                answer
                for result in results.values()
                if (result["context"], result["task"]) == (context, task)
                for answer in result["answers"]
            ]
            asked += len(answers)
            scores[task] = float(np.mean([answer["score"] for answer in answers])) if answers else None
        measured = [score for score in scores.values() if score is not None]
        if measured:
            row = {"context": context, "examples": asked, **scores, "mean": float(np.mean(measured))}
            found_rows.append({**row, "is_whole": len(measured) == len(scores)})
    return found_rows


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """By the effective context, and where there is none by the mean at the shortest."""
    by_context = {row["context"]: row["mean"] if row["is_whole"] else 0.0 for row in rows}
    reached, longest = effective_context(by_context), max(by_context)
    tasks = [name for name in (*GENERATED, *QUESTIONS) if any(row.get(name) is not None for row in rows)]
    means = ", ".join(f"{row['mean']:.1%} at {context_name(row['context'])}" for row in rows)
    beside = "" if len(tasks) == 13 else f", though over {len(tasks)} of the 13 tasks that it is for"
    start = f"RULER: {means}, the mean of {len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    if reached is None:
        grade = "fair" if max(by_context.values()) >= THRESHOLD / 2 else "bad"
        return grade, f"{start}; the threshold, {THRESHOLD:.1%}{beside}, is not reached at any context."
    grade = "good" if reached == longest else "fair"
    return grade, f"{start}; its effective context is {context_name(reached)}, by {THRESHOLD:.1%}{beside}."


def _settings(job: EvaluateJob) -> Settings:
    assert job.settings.ruler is not None
    return job.settings.ruler


def _tasks(settings: Settings) -> list[str]:
    """In the order of the paper, each once."""
    with_files = [task for task, url in zip(QUESTIONS, (settings.squad, settings.hotpotqa)) if url is not None]
    return [task for task in GENERATED if task in settings.tasks] + with_files


def _documents(job: EvaluateJob, task: str) -> Documents | None:
    """The questions of a task of QUESTIONS. Raises UserError where the file is not what it has to be."""
    if task not in QUESTIONS:
        return None
    settings = _settings(job)
    key, url = {"qa_1": ("squad", settings.squad), "qa_2": ("hotpotqa", settings.hotpotqa)}[task]
    assert url is not None
    return _read(f"evaluate.ruler.{key}", named_file(f"evaluate.ruler.{key}", url, job.storage))


@functools.lru_cache(maxsize=2)
def _read(key: str, file: NamedFile) -> Documents:
    try:
        return read_documents(json.loads(file.read()))
    except (BadData, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file.url}: {error}; name a file as it is published") from None
