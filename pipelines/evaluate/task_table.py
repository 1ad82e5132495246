"""The tasks of an evaluation, each a module of `pipelines.evaluate.tasks` that is imported where it is used.

A new task is that module, its settings in `pipelines.recipe.evaluate`, and a line here. The module has, and imports
neither torch nor Ray at its head, as drivers and reports import it too:

    TITLE: str                               of its table in the report
    lacks(job) -> str | None                 why it cannot be measured, a clause with the remedy; None where it can be
    cells(job) -> list[Cell]                 what is to be measured, fixed by the job, and cheap
    measure(job, cell) -> dict               plain JSON, by a worker or by all ranks of `job.group` alike

and, where needed:

    check(job) -> None                       raises UserError for settings that can only fail, before anything runs
    rows(job, results) -> Sequence[Row]      rows of the table from results by the names of cells, without those of
                                             holes; by default a row a cell: {"part": name, **result}
    verdict(rows) -> (grade, sentence)       what the rows say, good, fair or bad, for the report

An error that `measure` raises leaves a hole with its first line as the reason; files go to `job.store` on the rank that
`job.is_first`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row


@dataclass(frozen=True)
class Task:
    """A line of the table."""

    name: str
    module: str

    @property
    def title(self) -> str:
        """Of its table."""
        return str(self._loaded.TITLE)

    def lacks(self, job: EvaluateJob) -> str | None:
        """Why it cannot be measured; None where it can be."""
        lacks: str | None = self._loaded.lacks(job)
        return lacks

    def check(self, job: EvaluateJob) -> None:
        """Raise UserError for settings that can only fail."""
        if hasattr(self._loaded, "check"):
            self._loaded.check(job)

    def cells(self, job: EvaluateJob) -> list[Cell]:
        """What is to be measured."""
        cells: list[Cell] = self._loaded.cells(job)
        return cells

    def measure(self, job: EvaluateJob, cell: Cell) -> dict[str, Any]:
        """Measure a cell."""
        result: dict[str, Any] = self._loaded.measure(job.of_task(self.name), cell)
        return result

    def rows(self, job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> tuple[Row, ...]:
        """The rows of all results by cell."""
        if hasattr(self._loaded, "rows"):
            return tuple(self._loaded.rows(job.of_task(self.name), results))
        return tuple({"part": name, **result} for name, result in results.items())

    def verdict(self, rows: Sequence[Row]) -> tuple[str, str] | None:
        """Grade and sentence, where the task has any."""
        if not rows or not hasattr(self._loaded, "verdict"):
            return None
        grade, sentence = self._loaded.verdict(rows)
        return grade, sentence

    @property
    def _loaded(self) -> ModuleType:
        return import_module(f"pipelines.evaluate.tasks.{self.module}")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("heldout", "heldout_loss"),
        Task("needle", "needle"),
        Task("multi-needle", "multi_needle"),
        Task("ruler", "ruler_task"),
        Task("perplexity", "perplexity"),
        Task("choice", "choice"),
        Task("qa", "qa"),
        Task("video-needle", "video_needle"),
        Task("reconstruction", "reconstruction"),
        Task("generation", "generation"),
    )
}
"""By name, in the order of the report."""


def settings_key(task: str) -> str:
    """The key of a task's own settings in `evaluate`, if it has any."""
    return task.replace("-", "_")


def all_cells(job: EvaluateJob, names: Sequence[str] = tuple(TASKS)) -> list[Cell]:
    """The cells of these tasks, of those that can be measured."""
    return [cell for name in names if TASKS[name].lacks(job) is None for cell in TASKS[name].cells(job)]
