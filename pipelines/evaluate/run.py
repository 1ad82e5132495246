"""Evaluates the trained models of a run: cells, each committed once, then one table of figures a task.

In: the listing, the VQGAN, packed shards and the model of every training stage. Out: a record a cell, pictures, and in
the manifest the figures and the holes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipelines.cluster.progress import Bar
from pipelines.dag.records import JsonRecords
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import EvaluateFigures, EvaluateOutputs, EvaluateRecord, Row
from pipelines.evaluate.run_cells import Results, run_cells
from pipelines.evaluate.task_table import TASKS, all_cells

log = logging.getLogger("ringworld")


def evaluate_all(job: EvaluateJob, line: Bar) -> EvaluateRecord:
    """Measure every cell of every task that can be measured."""
    cells = all_cells(job)
    results = run_cells(job, cells, lambda: line.advance(1))
    figures = EvaluateFigures.of(rows_by_task(job, cells, results), results.holes)
    keys = ("stage", "source", "modality", "nats_per_token", "unigram_heldout", "unigram_train")
    message = "evaluate: %s %s %s: %.3f nats/token, unigram %.3f on the same tokens, %.3f from training shards"
    for row in figures.heldout:
        log.info(message, *(row[key] for key in keys))
    if results.holes:
        log.warning(
            "evaluate: %d of %d cells are holes; mend the cause and run with --rebuild evaluate to try them again",
            len(results.holes),
            len(cells),
        )
    pictures = tuple(name for name in job.store.names("pictures") if name.endswith(".png"))
    return EvaluateRecord(EvaluateOutputs(tuple(map(JsonRecords.name, results.by_cell)), pictures), figures)


def rows_by_task(job: EvaluateJob, cells: Sequence[Cell], results: Results) -> dict[str, tuple[Row, ...]]:
    """The rows of each task that has cells."""
    return {
        name: TASKS[name].rows(job, {cell: results.by_cell[cell] for cell in names if cell in results.by_cell})
        for name, names in _names_by_task(cells).items()
    }


def _names_by_task(cells: Sequence[Cell]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for cell in cells:
        names.setdefault(cell.task, []).append(cell.name)
    return names
