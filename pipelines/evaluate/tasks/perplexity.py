"""Loss of long held-out text by the position of a token: whether more context keeps helping, and how far.

Each window is text of one document from its beginning or from where the window before ended, so that what stands far
back belongs to what is predicted. Positions count from the window's BOS; bins double.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.haystack import lacks_text, texts
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row
from pipelines.evaluate.tasks.position_bins import bin_edges, rows_of_bins, windows
from pipelines.recipe.evaluation_tasks import Perplexity as Settings
from storage.errors import BadData, UserError

TITLE = "Loss by position"
EARLY = 32
"""Positions below it are those with next to no context, for the verdict."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.settings.perplexity is None:
        return "evaluate.perplexity is not there; set perplexity.context"
    return lacks_text(job)


def check(job: EvaluateJob) -> None:
    """There is something before the last bin to compare it with."""
    if _settings(job).context < 64:
        raise UserError("evaluate.perplexity.context: positions below 64 have no bins to compare; use at least 64")


def cells(job: EvaluateJob) -> list[Cell]:
    """A window each."""
    context = _settings(job).context
    return [
        Cell(f"perplexity-{context}-{number}", "perplexity", {"context": context, "window": number})
        for number in range(_settings(job).windows)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Score a window; of none, say so. Raises BadData where no document fills a single one."""
    from itertools import islice

    from model.inference.scoring import score_documents

    context, number = cell.arguments["context"], cell.arguments["window"]
    tokenizer = job.subject.tokenizer()
    documents = (tokenizer.encode(text) for text in texts(job))
    own = next(islice(windows(documents, context, number + 1, tokenizer.bos_id), number, None), None)
    if own is None:
        if number == 0:
            raise BadData(
                f"no held-out document has {context} tokens; lower evaluate.perplexity.context, or set evaluate.text"
            )
        return {"context": context, "window": number, "is_absent": True}
    edges = bin_edges(context)
    scores = score_documents(job.subject.model(job.group), [own], job.group, edges)
    nats, targets = scores.nll.sum(axis=0), scores.targets.sum(axis=0)
    return {"context": context, "window": number, "edges": edges, "nats": nats.tolist(), "targets": targets.tolist()}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a bin, over all windows that there are."""
    own = [result for result in results.values() if not result.get("is_absent")]
    if not own:
        return []
    nats = [sum(column) for column in zip(*(result["nats"] for result in own))]
    targets = [sum(column) for column in zip(*(result["targets"] for result in own))]
    made = rows_of_bins(own[0]["edges"], nats, targets)
    return [{"context": own[0]["context"], "windows": len(own), **row} for row in made]


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """Of the last bin beside the first tokens, which have next to no context, and beside the best bin before it."""
    last, best = rows[-1], min(rows[:-1], key=lambda row: row["nats_per_token"])
    early = [row for row in rows[:-1] if row["to"] < EARLY] or rows[:1]
    first = sum(row["nats_per_token"] * row["targets"] for row in early) / sum(row["targets"] for row in early)
    learnt, gain = first - last["nats_per_token"], best["nats_per_token"] - last["nats_per_token"]
    grade = "bad" if learnt < 0.1 or gain <= -0.1 else "good" if gain >= 0.01 else "fair"
    beside = "as much as" if abs(gain) < 0.005 else f"{abs(gain):.2f} {'less' if gain > 0 else 'more'} than"
    return grade, (
        f"By position, a held-out token costs {last['nats_per_token']:.2f} nats from {last['from']:,} to "
        f"{last['to']:,}: {abs(learnt):.2f} {'less' if learnt > 0 else 'more'} than up to {early[-1]['to']}, and "
        f"{beside} at the best in between, {best['from']:,} to {best['to']:,}; over {rows[0]['windows']} "
        f"window{'s' if rows[0]['windows'] > 1 else ''}."
    )


def _settings(job: EvaluateJob) -> Settings:
    assert job.settings.perplexity is not None
    return job.settings.perplexity
