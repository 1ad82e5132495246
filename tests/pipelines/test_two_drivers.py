"""Drivers of `ringworld run` on one output: one at a time, through a store's faults, and none writes after its turn."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage.lease import LEASE, STALE_SECONDS
from storage.store import Store
from storage.urls import list_objects
from testing.drivers import Driver
from testing.faulty_proxy import Faults, Rule
from testing.miniature import ringworld, text_recipe, write_recipe
from testing.s3_server import KEY, SECRET, ObjectStore

pytestmark = pytest.mark.faults


def tokenized(store: Store) -> list[str]:
    """The partitions that are committed: files of documents, which have their records."""
    return store.names("stages/tokenize/documents")


@dataclass
class Turns:
    """What four drivers did on one output, one after another."""

    store: Store
    before: list[str] = field(default_factory=list)  # partitions that the first had committed when it was stopped
    refused: tuple[int, str] = (0, "")
    filled: tuple[int, str] = (0, "")
    filled_log: str = ""
    bad_requests: int = 0
    unfinished: list[str] = field(default_factory=list)  # uploads, of two that dead writers had left
    left: list[Any] = field(default_factory=list)  # before the first went on, and after it had ended
    resumed: tuple[int, str] = (0, "")
    expired: tuple[int, str] = (0, "")
    expired_log: str = ""
    shown: list[str] = field(default_factory=list)  # what any of them said, and the command lines of their processes
    half: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def turns(object_store: ObjectStore, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    folder = tmp_path_factory.mktemp("turns")
    recipe = write_recipe(folder / "recipe.yaml", text_recipe(sources, "s3://data/turns"))
    store = Store("s3://data/turns", object_store.options)
    done, proxy = Turns(store), Faults.before(object_store.endpoint)
    through = {**object_store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}

    stopped = Driver.start(recipe, "stopped", **object_store.environment)
    try:
        stopped.until(lambda: len(tokenized(store)) > 0)
        os.kill(stopped.process.pid, signal.SIGSTOP)
        done.before = tokenized(store)
        second = ringworld("run", recipe, **object_store.environment)
        done.refused = (second.returncode, second.stderr)
        held = store.read_json(LEASE)
        assert store.replace_json(LEASE, held, {**held, "beat": held["beat"] - STALE_SECONDS - 1})

        for place in ("turns/stages/pack-old/1", "turns-not"):
            object_store.fs.call_s3("create_multipart_upload", Bucket="data", Key=f"{place}/0.tar")
        bursts = [Rule(verb, fault, 6) for verb in ("GET", "PUT", "HEAD") for fault in ("503:SlowDown", 500)]
        cuts = [Rule("PUT .*documents/", "cut-request:100", 2), Rule("GET .*parquet", "cut:100", 3)]
        full = Rule(r"PUT .*pack-text/.*\.tar", "403:QuotaExceeded")
        proxy.set_rules(*cuts, *bursts, full)
        filled = Driver.start(recipe, "filled", **through)
        try:
            done.filled = filled.end()
        finally:
            filled.kill()
        uploads = object_store.fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads", [])
        done.unfinished = [upload["Key"] for upload in uploads if upload["Key"].startswith("turns")]
        done.filled_log = filled.log.read_text()
        done.bad_requests = sum(rule.seen for rule in [*bursts, *cuts])
        done.half = [name for name in store.names() if "/pack-text/" in name and "started.json" not in name]

        done.left.append(list(list_objects("s3://data/turns/**", object_store.options)))
        os.kill(stopped.process.pid, signal.SIGCONT)
        done.resumed = stopped.end()
        done.left.append(list(list_objects("s3://data/turns/**", object_store.options)))
    finally:
        stopped.kill()

    proxy.set_rules(Rule("PUT .*pack-text/shards/", None))
    expired = Driver.start(recipe, "expired", **through)
    try:
        expired.until(lambda: bool(proxy.rules[0].seen))
        proxy.rules.append(Rule(".", "400:ExpiredToken"))
        done.expired = expired.end()
    finally:
        expired.kill()
    done.expired_log = expired.log.read_text()
    drivers = (stopped, filled, expired)
    done.shown = [said for driver in drivers for said in (driver.log.read_text(), *driver.commands)]
    return done


def test_of_two_drivers_on_one_bucket_the_second_is_refused(turns: Turns) -> None:
    code, said = turns.refused
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("ringworld: s3://data/turns: another driver (pid ")
    assert "give this run its own storage.root" in line


def test_a_run_rides_out_bursts_and_cuts_and_says_so(turns: Turns) -> None:
    assert turns.bad_requests > 20
    assert "just now" in turns.filled_log
    assert turns.before
    assert set(turns.before) < set(tokenized(turns.store))


def test_a_bucket_that_fills_ends_the_run_in_one_sentence_with_nothing_half_written(turns: Turns) -> None:
    code, said = turns.filled
    assert code == 2
    assert said.startswith("ringworld: s3://data/turns/stages/pack-text/")
    assert "QuotaExceeded" in said
    assert "the store is full: free space or raise the quota there" in said
    assert turns.half == []
    assert turns.unfinished == ["turns-not/0.tar"], "what dead writers left is removed, in the run's own folder"


def test_a_driver_that_comes_back_after_its_lease_was_taken_over_ends_and_writes_nothing(turns: Turns) -> None:
    code, said = turns.resumed
    assert code == 2
    assert said.startswith("ringworld: s3://data/turns: this driver did not renew its lease for over 60 s")
    assert "another driver has had it; this one writes nothing more and ends" in said
    before, after = turns.left
    assert before == after


def test_credentials_that_expire_amid_a_run_end_it_in_one_sentence(turns: Turns) -> None:
    code, said = turns.expired
    assert code == 2
    assert "ExpiredToken" in said
    assert "the credentials have expired: get fresh ones" in said
    assert [line.split()[3] for line in turns.expired_log.splitlines() if " tokenize " in line][:1] == ["done"]


def test_credentials_of_the_environment_are_in_no_log_and_no_process_list(turns: Turns) -> None:
    assert sum("raylet" in said for said in turns.shown) >= 3
    for said in (*turns.shown, turns.refused[1]):
        assert SECRET not in said
        assert KEY not in said


def test_of_two_drivers_on_one_folder_the_second_is_refused(sources: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", text_recipe(sources, tmp_path / "run"))
    old, young = tmp_path / "run/stages/pack-old/1/.tmp-dead", tmp_path / "run/.tmp-young"
    old.parent.mkdir(parents=True)
    old.touch()
    young.touch()  # as of a driver that asks for the lease just now
    first = Driver.start(recipe, "first")
    try:
        first.until(lambda: not old.exists())
        assert young.exists()
        second = ringworld("run", recipe)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"ringworld: {tmp_path}/run: another driver (pid {first.process.pid} on ")
        assert first.process.poll() is None
    finally:
        first.kill()
