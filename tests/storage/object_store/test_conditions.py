"""Who may write, on stores of every kind: by conditions where the store honours them, as well as can be where not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage import lease as leases
from storage.errors import UserError
from storage.lease import LEASE, lease
from storage.store import Store
from testing.cloud_stores import CloudStore, cloud_store
from testing.faulty_proxy import Faults, Rule
from testing.s3_server import ObjectStore

pytestmark = pytest.mark.slow

MIB = 2**20
DEAD = {"owner": "x", "host": "elsewhere", "pid": 1, "beat": 0.0}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FENCE_SECONDS", 0.0)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 60.0)  # a beat that finds the lease lost would end the test
    monkeypatch.setattr(leases, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 1.0)


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CloudStore]:
    with cloud_store(request.param, tmp_path) as running:
        yield running


@pytest.fixture
def proxy(object_store: ObjectStore) -> Faults:
    return Faults.before(object_store.endpoint)


def through(proxy: Faults, store: ObjectStore, folder: str) -> Store:
    return Store(f"s3://data/conditions/{folder}", {**store.options, "endpoint_url": proxy.endpoint})


def test_a_lease_is_renewed_and_taken_over_after_a_crash_on_every_cloud(
    cloud: CloudStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"{cloud.url}/a run", cloud.options)
    with monkeypatch.context() as quick:
        quick.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
        with lease(store):
            first, renewed = store.read_json(LEASE), threading.Event()
            for _ in range(400):
                if store.read_json(LEASE)["beat"] > first["beat"]:
                    break
                renewed.wait(0.05)
            else:
                pytest.fail("the lease is not renewed")
    store.write_json(LEASE, DEAD)
    with lease(store) as held:
        with pytest.raises(UserError, match="another driver"), lease(store):
            pass
        held.write_json("made", 1)
        store.write_json(LEASE, DEAD)
        with pytest.raises(UserError, match="the lease is now that of pid 1 on elsewhere"):
            held.write_json("made", 2)
    assert store.read_json("made") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_name_is_taken_once_and_replaced_only_by_who_knows_what_it_holds_on_every_cloud(cloud: CloudStore) -> None:
    store = Store(f"{cloud.url}/taken", cloud.options)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda number: store.create_json("lock", number), range(4))) == 1
        held = store.read_json("lock")
        assert sum(pool.map(lambda number: store.replace_json("lock", held, 100 + number), range(4))) == 1
    assert store.honours_conditions("lock", 7)
    assert store.read_json("lock") >= 100
    with store.writing("large") as file:
        file.write(b"x" * (17 * MIB))
    assert store.sizes() == {"large": 17 * MIB, "lock": 4}
    assert cloud.parts == {}


def test_a_second_driver_is_kept_out_by_a_store_that_ignores_conditions_which_is_said(
    object_store: ObjectStore, proxy: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.unconditional = True
    store = through(proxy, object_store, "ignored")
    with lease(store):
        held = store.read_json(LEASE)
        with pytest.raises(UserError, match="another driver"), lease(store):
            pass
        assert store.read_json(LEASE) == held
    said = [record.message for record in caplog.records if "ignores the conditions" in record.message]
    assert len(said) == 1
    assert "start one driver at a time" in said[0]


def test_of_drivers_that_start_at_once_on_a_store_that_ignores_conditions_one_gets_in(
    object_store: ObjectStore, proxy: Faults
) -> None:
    proxy.unconditional = True
    store, together, ended = through(proxy, object_store, "at-once"), threading.Barrier(3), threading.Event()
    store.write_json(LEASE, DEAD)
    inside: list[int] = []

    def drive(number: int) -> str:
        together.wait()
        try:
            with lease(store):
                inside.append(number)
                ended.wait(20)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        drives = [pool.submit(drive, number) for number in range(3)]
        refused = [drive for drive in drives if not wait_until_done(drive, ended, inside, drives)]
        ended.set()
        said = [drive.result() for drive in drives]
    assert len(inside) == 1
    assert not refused
    assert sorted("another driver" in one for one in said) == [False, True, True]


def wait_until_done(drive: Any, ended: threading.Event, inside: list[int], drives: list[Any]) -> bool:
    """Whether all but one of the drives end by themselves while that one holds the lease."""
    for _ in range(400):
        if sum(one.done() for one in drives) == len(drives) - 1:
            return True
        ended.wait(0.05)
    return False


def test_a_write_costs_one_request_and_by_parts_two_more_besides_a_look_at_the_lease(
    object_store: ObjectStore, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "FENCE_SECONDS", 1e6)
    store = through(proxy, object_store, "requests")
    with lease(store) as held:
        assert [line.partition(" ")[0] for line in proxy.lines] == ["GET", "PUT", "PUT", "PUT"]
        held.write_json("first", 1)  # and its look at the lease
        proxy.set_rules()
        held.write_json("small", 1)
        assert [line.partition(" ")[0] for line in proxy.lines] == ["PUT"]
        proxy.set_rules()
        with held.writing("large") as file:
            file.write(bytes(17 * MIB))
        assert sorted(line.partition(" ")[0] for line in proxy.lines) == ["POST", "POST", "PUT", "PUT"]


@pytest.mark.parametrize(("mebibytes", "matching"), [(18, "partNumber=2"), (40, "partNumber=1")])
def test_an_upload_that_was_under_way_when_the_lease_was_lost_is_not_completed(
    object_store: ObjectStore, proxy: Faults, mebibytes: int, matching: str
) -> None:
    store = through(proxy, object_store, f"under-way-{mebibytes}")
    direct = Store(store.url, object_store.options)
    with lease(store) as held, ThreadPoolExecutor(1) as pool:
        released, errors = threading.Event(), []
        proxy.held = (matching, released)

        def write() -> None:
            try:
                with held.writing("large") as file:
                    file.write(bytes(mebibytes * MIB))
            except UserError as error:
                errors.append(str(error))

        writing = pool.submit(write)
        while not any(matching in line for line in proxy.lines):
            assert not writing.done()
        direct.write_json(LEASE, DEAD)
        released.set()
        writing.result()
    assert len(errors) == 1
    assert "the lease is now that of pid 1 on elsewhere" in errors[0]
    assert not direct.exists("large")
    uploads = object_store.fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads", [])
    assert not [upload for upload in uploads if "under-way" in upload["Key"]]


def test_a_put_that_is_repeated_is_not_sent_once_the_lease_is_lost(
    object_store: ObjectStore, proxy: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = through(proxy, object_store, "repeated")
    store = Store(store.url, {**store.options, "config_kwargs": {"retries": {"max_attempts": 3}}})
    direct = Store(store.url, object_store.options)
    with lease(store) as held:
        proxy.set_rules(Rule("PUT .*/small", 503))
        monkeypatch.setattr("storage.retry.time.sleep", lambda _: direct.write_json(LEASE, DEAD))
        with pytest.raises(UserError, match="the lease is now that of pid 1 on elsewhere"):
            held.write_json("small", 1)
    assert not direct.exists("small")
