"""Runs the fixed partitions of a stage as Ray tasks, each committed once.

A partition is one unit of retry and of resume. Its task is a pure function of its inputs: it writes its outputs
atomically and its record `partitions/<id>.json` last, so a killed worker, node or driver leaves either nothing or the
same bytes, and a re-run skips what has a record. A partition that turns out large answers with the pieces to be made
first, each a task of its own, and is then started again. One whose worker or node is lost is started again after the
others, within the bounds of `pipelines.dag.failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.cluster.placement import PlacementWait, first_ready
from pipelines.cluster.ray_cluster import own_errors
from pipelines.dag.failures import LOST, Failures
from pipelines.recipe import Resources
from storage.store import Store


def record_name(partition: str) -> str:
    """Where the record of a partition is committed, below its stage's folder."""
    return f"partitions/{partition}.json"


def committed(store: Store, partitions: Sequence[str]) -> dict[str, Any]:
    """The records of those partitions that are already done."""
    present = set(store.names("partitions"))
    return {part: store.read_json(record_name(part)) for part in partitions if record_name(part) in present}


@dataclass(frozen=True)
class Pieces:
    """A partition's answer in place of its record: tasks of these pieces come first, and then its own once more."""

    pieces: tuple[Any, ...]


@dataclass(frozen=True)
class PieceTasks:
    """submit: starts the task of a piece; what it makes it leaves where its partition finds it. on_done: called with
    how many pieces are still to be made, whenever one is.
    """

    submit: Callable[[Any], ray.ObjectRef]
    on_done: Callable[[int], None]


def run_partitions(
    stage: str,
    submit: Callable[[str], ray.ObjectRef],
    partitions: Sequence[str],
    store: Store,
    pool: Resources,
    on_done: Callable[[dict[str, Any]], None],
    pieces: PieceTasks | None = None,
) -> list[dict[str, Any]]:
    """Run what is not committed, at most `pool.workers` tasks at a time; the records of all partitions, in their order.

    submit: starts the task of a partition, which commits the record and returns it or, where there are PieceTasks,
    may return `Pieces`; Ray itself is not to retry it. pool: what each task asks for. on_done: called with every record
    as it arrives, those found committed first. Raises UserError where the worker or node of one partition is lost too
    often, or no node of the cluster could ever run one.
    """
    records = committed(store, partitions)
    for record in records.values():
        on_done(record)
    waiting: list[tuple[str, Any]] = [(part, None) for part in partitions if part not in records][::-1]
    running: dict[ray.ObjectRef, tuple[str, Any]] = {}
    missing: dict[str, int] = {}  # pieces still to be made, by partition
    failures, wait = Failures(stage), PlacementWait(stage, pool)
    while waiting or running:
        while waiting and len(running) < pool.workers:
            part, piece = waiting.pop()
            task = submit(part) if piece is None else _of(pieces).submit(piece)
            running[task] = (part, piece)
        reference = first_ready(list(running), wait)
        part, piece = running.pop(reference)
        try:
            with own_errors():
                answer = ray.get(reference)
        except LOST as error:
            failures.add(f"partition {part}" if piece is None else f"{piece} of partition {part}", error)
            waiting.insert(0, (part, piece))
            continue
        if piece is not None:
            missing[part] -= 1
            if not missing[part]:
                waiting.append((part, None))
            _of(pieces).on_done(sum(missing.values()))
        elif isinstance(answer, Pieces):
            missing[part] = len(answer.pieces)
            waiting += [(part, one) for one in reversed(answer.pieces)]
        else:
            records[part] = answer
            on_done(answer)
    return [records[part] for part in partitions]


def _of(pieces: PieceTasks | None) -> PieceTasks:
    assert pieces is not None, "a partition wants pieces, and there is no task that makes them"
    return pieces
