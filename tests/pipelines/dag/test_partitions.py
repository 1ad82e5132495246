"""Partitions as Ray tasks: run once, in bounds, repeated after a killed worker, each told once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray

from pipelines.cluster import placement
from pipelines.dag.partitions import Pieces, run_partitions
from pipelines.dag.records import JsonRecords
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
        store.write_json(JsonRecords.name(name), record)
        return record

    return lambda name: work.options(max_retries=0).remote(name)


def run(
    submit: Any, store: Store, pool: Resources, on_piece: Callable[[int], None] = lambda left: None
) -> list[dict[str, Any]]:
    """Run the partitions that have these names; their records, in the order in which they came."""
    records: list[dict[str, Any]] = []
    run_partitions("test", submit, NAMES, JsonRecords(store), pool, records.append, on_piece)
    return records


def committed(store: Store) -> list[str]:
    return sorted(record["partition"] for record in JsonRecords(store).load(NAMES))


def names_of(records: list[dict[str, Any]]) -> list[str]:
    return sorted(record["partition"] for record in records)


def test_each_partition_is_run_once_in_order_and_no_more_at_once_than_asked(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    start = task(store)
    submitted: list[str] = []
    running: set[str] = set()
    most = 0

    def submit(name: str) -> ray.ObjectRef:
        nonlocal most
        submitted.append(name)
        running.add(name)
        most = max(most, len(running))
        return start(name)

    def on_done(record: dict[str, Any]) -> None:
        running.remove(record["partition"])

    run_partitions("test", submit, NAMES, JsonRecords(store), TWO, on_done)
    assert submitted == NAMES
    assert not running
    assert most == 2


def test_what_is_committed_is_not_submitted_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json(JsonRecords.name("part-1"), {"partition": "part-1", "from": "an earlier run"})
    store.write_json(JsonRecords.name("part-9"), {"partition": "part-9", "of": "another cut"})
    assert committed(store) == ["part-1"]
    start, submitted = task(store), []

    def submit(name: str) -> ray.ObjectRef:
        submitted.append(name)
        return start(name)

    records = run(submit, store, Resources(workers=4))
    assert submitted == ["part-0", "part-2", "part-3", "part-4"]
    assert records[0] == {"partition": "part-1", "from": "an earlier run"}
    assert names_of(records) == NAMES


def test_records_are_noted_as_they_come_and_written_whether_the_stage_ends_well_or_not(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    class Noting(JsonRecords):
        """As of a stage that writes records in bulk."""

        noted: ClassVar[list[dict[str, Any]]] = []
        flushed: ClassVar[list[int]] = []

        def add(self, record: dict[str, Any]) -> None:
            self.noted.append(record)

        def flush(self) -> None:
            self.flushed.append(len(self.noted))
            if len(self.noted) == 3:
                raise UserError("the disk is full")

    def on_done(record: dict[str, Any]) -> None:
        del record["taken out"]

    @ray.remote
    def work(name: str) -> dict[str, Any]:
        if name == "part-3":
            raise UserError(f"{name}: mend it")
        return {"partition": name, "taken out": 1}

    one = Resources(workers=1)
    with pytest.raises(UserError, match=r"^part-3: mend it$"):
        run_partitions("test", work.remote, NAMES, Noting(store), one, on_done)
    assert Noting.noted == [{"partition": name} for name in NAMES[:3]]
    assert Noting.flushed == [3]
    run_partitions("test", work.remote, NAMES[4:], Noting(store), one, on_done)
    assert Noting.noted[3:] == [{"partition": "part-4"}]
    assert Noting.flushed == [3, 4]


@pytest.mark.faults
def test_a_killed_worker_costs_a_repetition_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    records = run(task(store, dies="part-2"), store, TWO)
    assert store.exists("died")
    assert names_of(records) == NAMES


@pytest.mark.faults
def test_a_partition_that_kills_every_worker_ends_the_stage_with_its_name_after_the_others_are_made(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"^test: partition part-2 failed 5 times: its worker died 5 times; look "):
        run(task(store, kills="part-2"), store, TWO)
    assert committed(store) == [name for name in NAMES if name != "part-2"]


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
        run(submit, Store(str(tmp_path)), pool)
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
        run(task(store, fails="part-3"), store, Resources(workers=1))
    assert committed(store) == NAMES[:3]


def test_a_partition_is_made_once_its_pieces_are_and_others_meanwhile(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    @ray.remote
    def work(name: str) -> dict[str, Any] | Pieces:
        ahead = [f"{name}.{piece}" for piece in range(3) if not store.exists(f"{name}.{piece}")]
        if name == "part-1" and ahead:
            return Pieces(tuple(ahead))
        record = {"partition": name}
        store.write_json(JsonRecords.name(name), record)
        return record

    @ray.remote
    def make(piece: str) -> None:
        store.write_json(piece, True)

    left: list[int] = []

    def submit(name: str) -> ray.ObjectRef:
        return work.remote(name) if name in NAMES else make.remote(name)

    records = run(submit, store, TWO, left.append)
    assert names_of(records) == NAMES
    assert left == [2, 1, 0]
    assert all(store.exists(f"part-1.{piece}") for piece in range(3))
