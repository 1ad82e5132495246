"""Partitions as Ray tasks: run once, in bounds, repeated after a killed worker, told in the recipe's order."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.dag.partitions import Pieces, PieceTasks, committed, record_name, run_partitions
from storage.errors import UserError
from storage.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

NAMES = [f"part-{number}" for number in range(5)]


def task(store: Store, fails: str = "", dies: str = "") -> Any:
    """A partition's task that commits its record; the first ones take longest."""

    @ray.remote
    def work(name: str) -> dict[str, Any]:
        if name == fails:
            raise UserError(f"{name}: mend it")
        if name == dies and not store.exists("died"):
            store.write_json("died", True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1 * (len(NAMES) - int(name[-1])))
        record = {"partition": name}
        store.write_json(record_name(name), record)
        return record

    return lambda name: work.options(max_retries=-1).remote(name)


def test_records_come_in_the_recipes_order_and_no_more_run_at_once_than_asked(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    start = task(store)
    running: set[str] = set()
    most = 0

    def submit(name: str) -> ray.ObjectRef:
        nonlocal most
        running.add(name)
        most = max(most, len(running))
        return start(name)

    records = run_partitions(submit, NAMES, store, 2, lambda record: running.remove(record["partition"]))
    assert [record["partition"] for record in records] == NAMES
    assert most == 2


def test_what_is_committed_is_not_submitted_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json(record_name("part-1"), {"partition": "part-1", "from": "an earlier run"})
    store.write_json(record_name("part-9"), {"partition": "part-9", "of": "another cut"})
    assert list(committed(store, NAMES)) == ["part-1"]
    start, submitted, seen = task(store), [], []

    def submit(name: str) -> ray.ObjectRef:
        submitted.append(name)
        return start(name)

    records = run_partitions(submit, NAMES, store, 4, seen.append)
    assert submitted == ["part-0", "part-2", "part-3", "part-4"]
    assert seen[0] == records[1] == {"partition": "part-1", "from": "an earlier run"}
    assert len(seen) == 5


def test_a_killed_worker_costs_a_repetition_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    records = run_partitions(task(store, dies="part-2"), NAMES, store, 2, lambda record: None)
    assert store.exists("died")
    assert [record["partition"] for record in records] == NAMES


def test_a_users_mistake_in_a_task_surfaces_as_itself(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"^part-3: mend it$"):
        run_partitions(task(store, fails="part-3"), NAMES, store, 1, lambda record: None)
    assert sorted(committed(store, NAMES)) == NAMES[:3]


def test_a_partition_is_made_once_its_pieces_are_and_others_meanwhile(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    @ray.remote
    def work(name: str) -> dict[str, Any] | Pieces:
        ahead = [f"{name}.{piece}" for piece in range(3) if not store.exists(f"{name}.{piece}")]
        if name == "part-1" and ahead:
            return Pieces(tuple(ahead))
        record = {"partition": name}
        store.write_json(record_name(name), record)
        return record

    @ray.remote
    def make(piece: str) -> None:
        store.write_json(piece, True)

    left: list[int] = []
    records = run_partitions(work.remote, NAMES, store, 2, lambda record: None, PieceTasks(make.remote, left.append))
    assert [record["partition"] for record in records] == NAMES
    assert left == [2, 1, 0]
    assert all(store.exists(f"part-1.{piece}") for piece in range(3))
