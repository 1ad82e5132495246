"""Runs the partitions of a stage as Ray tasks, each committed once.

A partition is one unit of retry and of resume. Its task is a pure function of its inputs: it writes its outputs
atomically and its record last (`pipelines.dag.records`), so a killed worker, node or driver leaves either nothing or
the same bytes, and a re-run skips what has a record. A partition that turns out large answers with the pieces to be
made first, each a task of its own, and is then started again. One whose worker or node is lost is started again after
the others, within `CRASHES` and `LOSSES`, which count for each partition: a long run does not fail because it is long.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from pipelines.cluster.placement import PlacementWait, all_ready
from pipelines.cluster.ray_cluster import own_errors
from pipelines.dag.records import Record, Records
from pipelines.recipe import Resources
from storage.errors import UserError

log = logging.getLogger("ringworld")

CRASHES = 5
"""Times that a partition's worker may die or be killed for its memory, before the stage fails."""
LOSSES = 20
"""The same for any loss, of its node too, which is seldom the partition's fault."""

LOST = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""What Ray raises where the worker or the node of a task is gone; the same task may succeed elsewhere."""


@dataclass(frozen=True)
class Pieces:
    """A partition's answer in place of its record: tasks for these pieces come first, and then its own again."""

    pieces: tuple[Any, ...]


def run_partitions(
    stage: str,
    submit: Callable[[Any], ray.ObjectRef],
    partitions: Sequence[str],
    records: Records,
    pool: Resources,
    on_done: Callable[[Record], None],
    on_piece: Callable[[int], None] = lambda left: None,
) -> None:
    """Run what is not committed, at most `pool.workers` tasks at a time.

    submit: starts the task of a partition, or of a piece, without Ray's own retries. That of a partition commits the
    record and returns it, or returns `Pieces`; that of a piece writes what the partition then reads. records: those of
    the stage, each with the name of its `partition`. pool: what each task asks for. on_done: called once with the
    record of every partition as it arrives, those already committed first; what it takes out of it is not kept.
    on_piece: called with how many pieces are left, after each. Raises UserError where the worker or node of one
    partition is lost too often, or no node of the cluster could ever run one.
    """
    done = set()
    for record in records.load(partitions):
        done.add(record["partition"])
        on_done(record)
    waiting: deque[tuple[str, Any]] = deque((part, None) for part in reversed(partitions) if part not in done)
    del done
    try:
        _run(stage, submit, waiting, records, pool, on_done, on_piece)
    except BaseException:
        # Of a store that is the reason perhaps, or of a lease that is lost; the records are with the partitions.
        with contextlib.suppress(OSError, UserError):
            records.flush()
        raise
    records.flush()


def _run(
    stage: str,
    submit: Callable[[Any], ray.ObjectRef],
    waiting: deque[tuple[str, Any]],
    records: Records,
    pool: Resources,
    on_done: Callable[[Record], None],
    on_piece: Callable[[int], None],
) -> None:
    """Run partitions, of which the last is the first to start."""
    running: dict[ray.ObjectRef, tuple[str, Any]] = {}
    missing: dict[str, int] = {}  # pieces still to be made, by partition
    left = 0  # of all partitions
    failures, wait = Failures(stage), PlacementWait(stage, pool)
    while waiting or running:
        while waiting and len(running) < pool.workers:
            part, piece = waiting.pop()
            running[submit(part if piece is None else piece)] = (part, piece)
        for reference in all_ready(list(running), wait):
            part, piece = running.pop(reference)
            try:
                with own_errors():
                    answer = ray.get(reference)
            except LOST as error:
                failures.add(f"partition {part}" if piece is None else f"{piece} of partition {part}", error)
                waiting.appendleft((part, piece))
                continue
            if piece is not None:
                missing[part] -= 1
                left -= 1
                if not missing[part]:
                    del missing[part]
                    waiting.append((part, None))
                on_piece(left)
            elif isinstance(answer, Pieces):
                missing[part] = len(answer.pieces)
                left += len(answer.pieces)
                waiting += [(part, ahead) for ahead in reversed(answer.pieces)]
            else:
                on_done(answer)
                records.add(answer)


@dataclass
class Failures:
    """What happened to the tasks of one stage, by partition or piece of one."""

    stage: str
    _by_task: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, task: str, error: Exception) -> None:
        """Count a failure, one of `LOST`. Raises UserError where the task has failed too often."""
        if isinstance(error, OutOfMemoryError):
            what = "its worker was killed for lack of memory"
        elif isinstance(error, WorkerCrashedError):
            what = "its worker died"
        else:
            what = "its node was lost"
        counts = self._by_task.setdefault(task, Counter())
        counts[what] += 1
        crashes = sum(count for kind, count in counts.items() if kind != "its node was lost")
        if crashes < CRASHES and counts.total() < LOSSES:
            log.warning("%s: %s: %s; trying again (failure %d)", self.stage, task, what, counts.total())
            return
        history = ", ".join(f"{kind} {count} {'times' if count > 1 else 'time'}" for kind, count in counts.items())
        raise UserError(
            f"{self.stage}: {task} failed {counts.total()} times: {history}; look for the reason in Ray's worker logs, "
            f"give each worker more memory (with more cpus a worker in the recipe there are fewer on a node) or leave "
            f"its data out, and run the same command again"
        ) from error
