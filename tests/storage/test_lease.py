"""One driver a folder: refused, taken over, and fenced off when it comes back."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from storage import lease as leases
from storage.errors import UserError
from storage.lease import LEASE, STALE_SECONDS, lease
from storage.process_identity import ProcessIdentity
from storage.store import Store
from storage.urls import filesystem

HOLDER = """
import signal, sys, time
from storage import lease as leases
from storage.store import Store
from storage.errors import UserError
leases.HEARTBEAT_SECONDS = 0.05
try:
    with leases.lease(Store(sys.argv[1])) as store:
        store.write_json("made", "before")
        if sys.argv[2] == "training":  # Ray Train's handler, which stays when it is done
            signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        print("held", flush=True)
        time.sleep(120)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root") if request.param == "local" else f"memory://lease-{tmp_path.name}")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FENCE_SECONDS", 0.0)
    monkeypatch.setattr(leases, "WATCH_SECONDS", 0.3)


def age(store: Store) -> dict[str, Any]:
    """What a holder's lease is when it has not been renewed for long."""
    held: dict[str, Any] = store.read_json(LEASE)
    old = {**held, "beat": held["beat"] - STALE_SECONDS - 1}
    assert store.replace_json(LEASE, held, old)
    return old


@pytest.mark.parametrize("doing", ["tokenizing", "training", "in the background"])
def test_a_driver_that_was_stopped_too_long_finds_its_lease_anothers_and_ends_without_a_write(
    tmp_path: Path, doing: str
) -> None:
    store = Store(str(tmp_path))
    stopped = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] * (doing == "in the background")  # as a script's jobs have it
        + [sys.executable, "-c", HOLDER, str(tmp_path), doing],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "held\n"
        os.kill(stopped.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=rf"another driver \(pid {stopped.pid}"), lease(store):
            pass
        age(store)
        with lease(store) as mine:
            mine.write_json("made", "after")
            os.kill(stopped.pid, signal.SIGCONT)
            assert stopped.wait(60) == 2
            said = stopped.stdout.read()
            assert said.startswith(
                f"{tmp_path}: this driver did not renew its lease for over 60 s, and the lease is now"
            )
            assert f"that of pid {os.getpid()} on {socket.gethostname()}; this one writes nothing more and ends" in said
            mine.write_json("made", "in the end")
        assert store.names() == ["made"]
        assert store.read_json("made") == "in the end"
    finally:
        stopped.kill()
        stopped.wait()


def test_what_a_driver_hands_out_writes_nothing_once_the_lease_is_anothers(store: Store) -> None:
    with lease(store) as fenced:
        task = pickle.loads(pickle.dumps(fenced.at("stages")))  # as Ray sends it
        task.write_json("one", 1)
        held = store.read_json(LEASE)
        store.replace_json(LEASE, held, {**held, "owner": "another", "pid": 7})
        for change in (
            lambda: task.write_json("two", 2),
            lambda: task.create_json("two", 2),
            lambda: task.delete("one"),
            lambda: task.replace_json("one", 1, 2),
        ):
            with pytest.raises(UserError, match=r"the lease is now that of pid 7 .* writes nothing more and ends"):
                change()
        assert store.names("stages") == ["stages/one"]
        assert store.read_json("stages/one") == 1
        store.delete(LEASE)
        with pytest.raises(UserError, match="the lease is gone: another driver has had it"):
            task.write_json("two", 2)
        store.write_json(LEASE, {**held, "owner": "another"})
    assert store.read_json(LEASE)["owner"] == "another", "not let go by who does not hold it"


def test_of_many_that_find_a_dead_drivers_lease_one_takes_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    dead = {"owner": "x", "host": "elsewhere", "pid": 1, "beat": 0.0}
    inside, most, done = [], [], threading.Event()

    def drive() -> str | None:
        try:
            with lease(store):
                inside.append(1)
                most.append(len(inside))
                done.wait(5)
                inside.pop()
        except UserError as error:
            return str(error)
        return None

    store.write_json(LEASE, dead)
    said: list[str | None] = []
    threads = [threading.Thread(target=lambda: said.append(drive())) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(said) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert sum("another driver" in (one or "") for one in said) == 7
    assert not store.exists(LEASE)


def test_a_heartbeat_renews_the_lease_and_outlives_a_store_that_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    store, away = Store(str(tmp_path)), [OSError("away")] * 3
    real = Store.replace_json

    def failing(self: Store, name: str, old: Any, new: Any) -> bool:
        if away:
            raise away.pop()
        return real(self, name, old, new)

    monkeypatch.setattr(Store, "replace_json", failing)
    with lease(store):
        first = json.loads((tmp_path / LEASE).read_text())
        deadline = time.monotonic() + 20
        while (now := json.loads((tmp_path / LEASE).read_text())) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert now["owner"] == first["owner"]
        assert now["beat"] > first["beat"]
        assert not away
    assert os.listdir(tmp_path) == []


UNREADABLE = [b"", b"\0" * 200, b'{\n "beat": 17', b"null", b"[]", b'{"owner": "x"}']


@pytest.mark.parametrize("data", UNREADABLE)
def test_a_lease_that_a_power_cut_emptied_or_tore_is_refused_while_young_and_taken_over_when_old(
    store: Store, data: bytes
) -> None:
    with store.writing(LEASE) as file:
        file.write(data)
    with pytest.raises(UserError, match=r"lease\.json: this file does not say which driver .* delete it") as caught:
        lease(store).__enter__()
    assert "\n" not in str(caught.value)
    make_old(store)
    with lease(store) as fenced:
        fenced.write_json("made", 1)
    assert store.names() == ["made"]


def make_old(store: Store) -> None:
    fs, path = filesystem(store.path(LEASE), {})
    if store.is_local:
        os.utime(path, (time.time() - STALE_SECONDS - 1,) * 2)
    else:
        fs.store[path].modified -= datetime.timedelta(seconds=STALE_SECONDS + 1)


def test_a_driver_whose_lease_is_emptied_has_lost_it(store: Store) -> None:
    with lease(store) as fenced:
        with store.writing(LEASE) as file:
            file.write(b"")
        with pytest.raises(UserError, match="the lease is gone: another driver has had it"):
            fenced.write_json("made", 1)
    assert store.names() == [LEASE]


def test_a_lease_and_its_place_in_the_folder_are_synced_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, (tmp_path / LEASE).exists()))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with lease(Store(str(tmp_path))):
        (temporary, before), folder = synced[:2]
    assert temporary.startswith(".tmp-")
    assert not before, "the file's bytes, before it has its name"
    assert folder == (tmp_path.name, True), "and its name"


@pytest.mark.parametrize("before", ["absent", "empty"])
@pytest.mark.parametrize("writes", [False, True])
def test_a_root_that_the_lease_made_is_removed_if_nothing_was_written(
    tmp_path: Path, before: str, writes: bool
) -> None:
    store = Store(str(tmp_path / "root"))
    if before == "empty":
        (tmp_path / "root").mkdir()
    with lease(store) as held:
        if writes:
            held.write_json("made", 1)
    assert (tmp_path / "root").exists() == (writes or before == "empty")


def test_a_root_that_another_driver_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def create(self: Store, *arguments: Any) -> bool:
        attempts.append(1)
        if len(attempts) == 1:
            raise FileNotFoundError("root")
        return original(self, *arguments)

    original = Store.create_json
    monkeypatch.setattr(Store, "create_json", create)
    with lease(Store(str(tmp_path / "root"))) as held:
        held.write_json("made", 1)


def test_a_name_below_a_file_is_not_called_taken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Store(str(tmp_path / "file")).create_json(LEASE, 1)


def test_a_root_that_can_not_be_made_is_named_as_such() -> None:
    with pytest.raises(UserError, match="no such place"), lease(Store("/proc/ringworld")):
        pass


def leave(store: Store, **changes: Any) -> dict[str, Any]:
    """A lease that a driver on another machine, whose clock differs, has left."""
    left = {"owner": "x", "host": "elsewhere", "pid": 7, "beat": time.time(), **changes}
    store.write_json(LEASE, left)
    return left


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0, 1e9])  # seconds by which its clock differs
def test_a_driver_is_dead_when_its_lease_does_not_change_and_lives_when_it_does_whatever_its_clock_says(
    store: Store, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "WATCH_SECONDS", 2.0)
    left, ended = leave(store, beat=time.time() + ahead), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            store.write_json(LEASE, {**left, "beat": time.time() + ahead})

    living = threading.Thread(target=beat)
    living.start()
    try:
        with pytest.raises(UserError, match=r"another driver \(pid 7 on elsewhere\) writes here"), lease(store):
            pass
    finally:
        ended.set()
        living.join()
    with lease(store) as held:
        held.write_json("made", 1)
    assert store.names() == ["made"]


def test_of_this_machine_the_clock_alone_tells_and_an_old_lease_is_taken_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "WATCH_SECONDS", 1e6)
    here = asdict(ProcessIdentity.current())  # a process that lives, stopped for long
    leave(store, **here, beat=time.time() - STALE_SECONDS - 1)
    with lease(store):
        pass


def test_a_young_lease_of_a_process_of_another_pid_namespace_is_refused_though_its_pid_is_none_here(
    store: Store,
) -> None:
    here = asdict(ProcessIdentity.current())
    for other in ({"pid_namespace": 1}, {"boot": "another"}):
        leave(store, **{**here, "pid": 2**22 + 1, **other})
        with pytest.raises(UserError, match="another driver"), lease(store):
            pass
    leave(store, **{**here, "pid": 2**22 + 1})
    with lease(store):
        pass


@pytest.mark.parametrize("beat", ["1", None, [], "NaN", "Infinity", 10**400])
def test_a_lease_whose_beat_is_no_time_does_not_say_who_writes(store: Store, beat: Any) -> None:
    text = json.dumps({"owner": "x", "host": "h", "pid": 1, "beat": beat})
    with store.writing(LEASE) as file:
        file.write(text.replace('"NaN"', "NaN").replace('"Infinity"', "Infinity").encode())
    with pytest.raises(UserError, match="does not say which driver writes here"), lease(store):
        pass


def test_beats_that_fail_are_said_once_a_while_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.01)
    failed: list[int] = []

    def failing(*_: Any) -> bool:
        failed.append(1)
        raise OSError("the network is\naway")

    with lease(Store(str(tmp_path))), monkeypatch.context() as patched:
        patched.setattr(Store, "replace_json", failing)
        deadline = time.monotonic() + 20
        while len(failed) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    said = [record.message for record in caplog.records if "could not be renewed" in record.message]
    assert len(failed) >= 5
    assert said == [
        f"{tmp_path}/{LEASE}: the lease could not be renewed for 0 s (the network is away); trying on, but after 60 s "
        f"another driver may take it over"
    ]
