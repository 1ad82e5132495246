"""Partitions as Ray tasks: run once, in bounds, repeated after a killed worker, told in the recipe's order."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.cluster import placement
from pipelines.dag.partitions import Pieces, committed, record_name, run_partitions
from pipelines.recipe import Resources
from storage.errors import UserError
from storage.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

TWO = Resources(workers=2)
NAMES = [f"part-{number}" for number in range(5)]


def task(store: Store, fails: str = "", dies: str = "", kills: str = "") -> Any:
    """A partition's task that commits its record; the first ones take longest. It dies once, or kills each worker."""

    @ray.remote
    def work(name: str) -> dict[str, Any]:
        if name == fails:
            raise UserError(f"{name}: mend it")
        if name == kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == dies and not store.exists("died"):
            store.write_json("died", True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1 * (len(NAMES) - int(name[-1])))
        record = {"partition": name}
        store.write_json(record_name(name), record)
        return record

    return lambda name: work.options(max_retries=0).remote(name)


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

    def on_done(record: dict[str, Any]) -> None:
        running.remove(record["partition"])

    records = run_partitions("test", submit, NAMES, store, TWO, on_done)
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

    records = run_partitions("test", submit, NAMES, store, Resources(workers=4), seen.append)
    assert submitted == ["part-0", "part-2", "part-3", "part-4"]
    assert seen[0] == records[1] == {"partition": "part-1", "from": "an earlier run"}
    assert len(seen) == 5


@pytest.mark.faults
def test_a_killed_worker_costs_a_repetition_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    records = run_partitions("test", task(store, dies="part-2"), NAMES, store, TWO, lambda record: None)
    assert store.exists("died")
    assert [record["partition"] for record in records] == NAMES


@pytest.mark.faults
def test_a_partition_that_kills_every_worker_ends_the_stage_with_its_name_after_the_others_are_made(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"^test: partition part-2 failed 5 times: its worker died 5 times; look "):
        run_partitions("test", task(store, kills="part-2"), NAMES, store, TWO, lambda record: None)
    assert sorted(committed(store, NAMES)) == [name for name in NAMES if name != "part-2"]


def test_a_stage_for_which_no_node_has_a_place_says_so_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(placement, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(placement, "_LOOK_SECONDS", 0.5)
    pool = Resources(custom={"decode": 1})

    @ray.remote(max_retries=0, resources=pool.custom)
    def work(name: str) -> None: ...

    tasks: list[ray.ObjectRef] = []

    def submit(name: str) -> ray.ObjectRef:
        tasks.append(work.remote(name))
        return tasks[-1]

    with pytest.raises(UserError, match=r"^test: the cluster has had no nodes for 1 x {'CPU': 1.0, 'decode': 1.0} for"):
        run_partitions("test", submit, NAMES, Store(str(tmp_path)), pool, lambda record: None)
    for task in tasks:  # which would wait for their nodes through the tests of other files
        ray.cancel(task)
    assert "waiting for 1 s at most" in caplog.text


def test_a_wait_goes_on_while_an_autoscaler_launches_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = placement.PlacementWait("test", Resources(custom={"decode": 1}), seconds=0.0)
    status = {"autoscaler_report": {"pending_launches": {"decoders": 1}}}
    monkeypatch.setattr(placement, "_internal_kv_get", lambda key: json.dumps(status).encode())
    wait.check()
    wait.check()
    monkeypatch.setattr(placement, "_internal_kv_get", lambda key: None)
    with pytest.raises(UserError):
        wait.check()


def test_a_users_mistake_in_a_task_surfaces_as_itself(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"^part-3: mend it$"):
        run_partitions("test", task(store, fails="part-3"), NAMES, store, Resources(workers=1), lambda record: None)
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

    def submit(name: str) -> ray.ObjectRef:
        return work.remote(name) if name in NAMES else make.remote(name)

    records = run_partitions("test", submit, NAMES, store, TWO, lambda record: None, left.append)
    assert [record["partition"] for record in records] == NAMES
    assert left == [2, 1, 0]
    assert all(store.exists(f"part-1.{piece}") for piece in range(3))
