"""Measures cells by groups of workers: each is committed once, and one that cannot be measured is a hole.

A cell whose workers died, ran out of memory or hung is begun anew by new ones, so often; a cell that raises an error is
not, since it would raise it again. What ends the whole evaluation is what no cell can be measured with: other code on a
node, a lost lease, no place for any group.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipelines.cluster.placement import PlacementWait
from pipelines.dag.partitions import CRASHES
from pipelines.dag.records import JsonRecords
from pipelines.evaluate.cell import Cell, Hole
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.worker_group import Failure, Kind, Measured, WorkerGroup
from storage.errors import UserError

log = logging.getLogger("ringworld")

ATTEMPTS: Mapping[Kind, int] = {
    "error": 1,
    "transient": CRASHES,
    "memory": 2,
    "lost": CRASHES,
    "died": CRASHES,
    "hung": 2,
}
"""Times that a cell may fail so before it is a hole."""
FAILED_STARTS = 5
"""Groups in a row that may die before they measure anything."""
_LOOK_SECONDS = 1.0


@dataclass
class Results:
    """Results by the names of cells, and the holes."""

    by_cell: dict[str, dict[str, Any]] = field(default_factory=dict)
    holes: list[Hole] = field(default_factory=list)


def run_cells(job: EvaluateJob, cells: Sequence[Cell], on_done: Callable[[], None] = lambda: None) -> Results:
    """Measure what is not committed in `job.store`, in this order, and return all results.

    on_done: called once a cell, also for those that were committed before, and for holes. Raises UserError where no
    group can start.
    """
    results, waiting = committed(job, cells)
    for _ in results.by_cell:
        on_done()
    if waiting:
        _Run(job, deque(waiting), results, on_done).until_done()
    in_order = [cell.name for cell in cells if cell.name in results.by_cell]
    results.by_cell = {name: results.by_cell[name] for name in in_order}
    order = {cell.name: number for number, cell in enumerate(cells)}
    results.holes.sort(key=lambda hole: order[hole.cell])
    return results


def committed(job: EvaluateJob, cells: Sequence[Cell]) -> tuple[Results, list[Cell]]:
    """The results that are there already, and the cells that are not."""
    results = Results()
    for task in dict.fromkeys(cell.task for cell in cells):
        names = [cell.name for cell in cells if cell.task == task]
        for record in JsonRecords(job.of_task(task).store).load(names):
            results.by_cell[record["partition"]] = record["result"]
    results.by_cell = {cell.name: results.by_cell[cell.name] for cell in cells if cell.name in results.by_cell}
    return results, [cell for cell in cells if cell.name not in results.by_cell]


class _Run:
    """The groups, and what they have still to do."""

    def __init__(self, job: EvaluateJob, waiting: deque[Cell], results: Results, on_done: Callable[[], None]) -> None:
        self._job, self._waiting, self._results, self._on_done = job, waiting, results, on_done
        pool, sp = job.settings.resources, job.settings.sp
        self._shared = ray.put(job)
        self._most = pool.workers // sp
        self._wait = PlacementWait("evaluate", pool, sp)
        self._groups: list[WorkerGroup] = []
        self._failures: dict[str, Counter[Kind]] = {}
        self._failed_starts = 0

    def until_done(self) -> None:
        """Run to the end, and end the groups."""
        try:
            while self._waiting or any(group.cell for group in self._groups):
                self._start_groups()
                for group in list(self._groups):
                    self._look_at(group)
                pending = [reference for group in self._groups for reference in group.pending]
                if pending:
                    ray.wait(pending, num_returns=1, timeout=_LOOK_SECONDS)
                if not any(group.is_ready for group in self._groups):
                    self._wait.check()
        finally:
            for group in self._groups:
                group.close()

    def _start_groups(self) -> None:
        """As many as there are cells for, and places in the recipe; those that find none on the cluster wait."""
        settings = self._job.settings
        busy = sum(group.cell is not None for group in self._groups)
        while len(self._groups) < min(self._most, busy + len(self._waiting)):
            self._groups.append(WorkerGroup(self._shared, settings.resources, settings.sp, settings.cell_seconds))

    def _look_at(self, group: WorkerGroup) -> None:
        cell = group.cell
        if cell is not None or not group.is_ready:
            outcome = group.outcome()
            if isinstance(outcome, Measured):
                self._results.by_cell[outcome.record["partition"]] = outcome.record["result"]
                self._on_done()
            elif isinstance(outcome, Failure):
                self._fail(group, cell, outcome)
        if group.is_ready and group.cell is None and self._waiting and group in self._groups:
            self._failed_starts = 0
            group.measure(self._waiting.popleft())

    def _fail(self, group: WorkerGroup, cell: Cell | None, failure: Failure) -> None:
        if self._job.store.fence is not None:
            self._job.store.fence()  # of a driver that has lost its lease no cell can be committed
        if not group.release(failure):
            group.close()
            self._groups.remove(group)
        log.debug("evaluate: %s: %s", cell.name if cell else "a group", failure.details)
        if cell is None:
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                raise UserError(
                    f"evaluate: {FAILED_STARTS} groups of workers died in a row before they measured anything "
                    f"({failure.reason}); look for the reason in Ray's worker logs, and run the same command again"
                )
            return
        counts = self._failures.setdefault(cell.name, Counter())
        counts[failure.kind] += 1
        if counts[failure.kind] < ATTEMPTS[failure.kind] and counts.total() < CRASHES:
            log.warning("evaluate: %s: %s; trying again", cell.name, failure.reason)
            self._waiting.append(cell)
            return
        times = f", {counts.total()} times" if counts.total() > 1 else ""
        hole = Hole(cell.name, cell.task, f"{failure.reason}{times}")
        log.warning("evaluate: %s is a hole: %s", hole.cell, hole.reason)
        self._results.holes.append(hole)
        self._on_done()
