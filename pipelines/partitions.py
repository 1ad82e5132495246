"""Runs the fixed partitions of a stage as Ray tasks, each committed once.

A partition is one unit of retry and of resume. Its task is a pure function of its inputs: it writes its outputs
atomically and its record `partitions/<id>.json` last, so a killed worker, node or driver leaves either nothing or the
same bytes, and a re-run skips what has a record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from pipelines.cluster import own_errors
from pipelines.storage import Store


def record_name(partition: str) -> str:
    """Where the record of a partition is committed, below its stage's folder."""
    return f"partitions/{partition}.json"


def committed(store: Store, partitions: Sequence[str]) -> dict[str, Any]:
    """The records of those partitions that are already done."""
    present = set(store.names("partitions"))
    return {part: store.read_json(record_name(part)) for part in partitions if record_name(part) in present}


def run_partitions(
    submit: Callable[[str], ray.ObjectRef],
    partitions: Sequence[str],
    store: Store,
    in_flight: int,
    on_done: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Run what is not committed, at most `in_flight` tasks at a time; the records of all partitions, in their order.

    submit: starts the task of a partition, which commits the record and returns it. on_done: called with every record
    as it arrives, those found committed first.
    """
    records = committed(store, partitions)
    for record in records.values():
        on_done(record)
    waiting = [part for part in partitions if part not in records][::-1]
    running: dict[ray.ObjectRef, str] = {}
    while waiting or running:
        while waiting and len(running) < in_flight:
            part = waiting.pop()
            running[submit(part)] = part
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            with own_errors():
                record = ray.get(reference)
            records[running.pop(reference)] = record
            on_done(record)
    return [records[part] for part in partitions]
