"""A store that fails for a while, or for good: ridden out within bounds, or one sentence; never half an object."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import retry
from storage.object_store import client
from storage.object_store.errors import StoreError
from storage.retry import Backoff
from storage.store import Store
from storage.urls import list_objects, object_info, open_ranged, open_url
from testing.faulty_proxy import Faults, Rule
from testing.s3_server import KEY, SECRET, ObjectStore

pytestmark = pytest.mark.slow

BODY = np.random.default_rng(2).bytes(20 * 2**20)
ONCE = {"config_kwargs": {"retries": {"max_attempts": 1}}}
NO_HELP = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REQUEST", Backoff(attempts=7, pause=0.01))
    monkeypatch.setattr(retry, "_warned", {})


@pytest.fixture(scope="module")
def proxy(object_store: ObjectStore) -> Faults:
    object_store.fs.pipe_file("data/faults/in/large", BODY)
    for name in ("a", "b"):
        object_store.fs.pipe_file(f"data/faults/in/{name}", name.encode())
    return Faults.before(object_store.endpoint)


def store(proxy: Faults, folder: str, **more: Any) -> Store:
    return Store(f"s3://data/faults/{folder}", {"endpoint_url": proxy.endpoint, "key": KEY, "secret": SECRET, **more})


@pytest.mark.parametrize(("statuses", "times"), [(("503:SlowDown", 500), 5), (("400:RequestTimeout",) * 2, 1)])
def test_bursts_of_refusals_are_ridden_out_and_said_once(
    proxy: Faults, caplog: pytest.LogCaptureFixture, statuses: tuple[int | str, int | str], times: int
) -> None:
    place = store(proxy, f"bursts-{times}", config_kwargs={"retries": {"max_attempts": 3}})
    parts = Rule("PUT .*partNumber=1", statuses[1], times)
    verbs = zip(("GET", "HEAD", "PUT", "POST"), statuses * 2)
    proxy.set_rules(parts, *(Rule(verb, status, times) for verb, status in verbs))
    with caplog.at_level(logging.WARNING, "ringworld"):
        assert place.create_json("new", 1)
        with place.writing("large") as file:
            file.write(BODY)
        assert place.names() == ["large", "new"]
        assert place.exists("new")
    assert [rule.seen for rule in proxy.rules] == [times] * 5
    said = [record.message for record in caplog.records if "just now" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"{place.url}/new: cannot be written just now (")
    proxy.set_rules()
    assert place.sha256("large") == hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("help_", [{}, NO_HELP])
def test_a_stream_that_is_cut_again_and_again_gives_every_byte_once(proxy: Faults, help_: dict[str, Any]) -> None:
    proxy.set_rules()
    proxy.faults[:] = ["cut:100000", None, "cut:0", "cut:700000", 503, "cut:5000000"] if not help_ else []
    if help_:
        proxy.rules[:] = [Rule("GET .*large", "cut:3000000", 1)]
    with open_url("s3://data/faults/in/large", store(proxy, "", **help_).options) as file:
        got = bytearray()
        while piece := file.read(999_999):
            got += piece
    assert got == BODY


@pytest.mark.parametrize(
    "fault", ["cut-request:0", "cut-request:100000", "cut:0"]
)  # before the body, amid it, and after it was all taken, when only the answer is lost
def test_a_write_that_is_cut_is_written_again_whole(proxy: Faults, object_store: ObjectStore, fault: str) -> None:
    place = store(proxy, f"cut-{fault.replace(':', '-')}")
    proxy.set_rules(Rule("PUT", fault, 2))
    with place.writing("small") as file:
        file.write(BODY[:300_000])
    proxy.set_rules(
        Rule("PUT .*partNumber=2", fault, 2), Rule("POST .*uploadId", fault if fault == "cut:0" else None, 1)
    )
    with place.writing("large") as file:
        file.write(BODY)
    proxy.set_rules()
    with place.open("small") as file:
        assert file.read() == BODY[:300_000]
    with place.open("large") as file:
        assert file.read() == BODY
    assert unfinished(object_store, "faults/cut") == []


def unfinished(object_store: ObjectStore, prefix: str) -> list[str]:
    found = object_store.fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]


def test_failing_without_end_is_one_sentence_and_never_an_answer(proxy: Faults) -> None:
    place = store(proxy, "in", **NO_HELP)
    proxy.set_rules(Rule(".", "503:SlowDown"))
    for doing, act in (
        ("read", lambda: place.open("a")),
        ("read", lambda: place.exists("none")),
        ("read", lambda: place.read_json("none")),
        ("listed", place.names),
        ("written", lambda: place.write_json("x", 1)),
        ("written", lambda: place.create_json("x", 1)),
        ("removed", lambda: place.delete("a")),
    ):
        with pytest.raises(StoreError, match=rf"^s3://data/faults/in\S*: cannot be {doing} [a-z]+ the store") as caught:
            act()
        assert f"the store at {proxy.endpoint} (503" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="503") as whole:  # which sends no medium to quarantine
        object_info("s3://data/faults/in/a", place.options)
    assert not isinstance(whole.value, StoreError)
    proxy.set_rules()
    assert place.names() == ["a", "b", "large"]


def test_a_store_without_conditional_puts_is_asked_first(proxy: Faults) -> None:
    place = store(proxy, "unconditional", **NO_HELP)

    def refusing_one() -> None:
        proxy.set_rules(Rule("PUT", "501:NotImplemented", 1))

    refusing_one()
    assert place.create_json("lock", 1)
    refusing_one()
    assert not place.create_json("lock", 2)
    refusing_one()
    assert place.replace_json("lock", 1, 3)
    assert [rule.seen for rule in proxy.rules] == [1]
    assert not place.replace_json("lock", 1, 4)
    assert place.read_json("lock") == 3


def test_an_error_is_no_end_of_an_object_whatever_the_name(proxy: Faults, object_store: ObjectStore) -> None:
    object_store.fs.pipe_file("data/faults/416", b"x" * 10)
    proxy.set_rules(Rule("GET", "503:SlowDown"))
    with pytest.raises(StoreError, match="503"):
        store(proxy, "", **NO_HELP).open("416")
    file = open_ranged("s3://data/faults/416", store(proxy, "", **NO_HELP).options, Backoff(attempts=1, pause=0))
    with pytest.raises(StoreError, match="503"):
        file.read(5)


def test_no_folder_is_left_out_of_a_listing_because_it_was_not_answered(proxy: Faults) -> None:
    options = store(proxy, "", **ONCE).options
    proxy.set_rules(Rule("prefix=faults%2Fin", 503))
    with pytest.raises(Exception, match=r"^s3://data/faults/\*/\*: cannot be used \(503"):
        list_objects("s3://data/faults/*/*", options)
    proxy.set_rules()
    assert "s3://data/faults/in/a" in [found.url for found in list_objects("s3://data/faults/*/*", options)]


def test_expired_credentials_are_one_sentence_at_once(proxy: Faults) -> None:
    place = store(proxy, "in")
    proxy.set_rules(Rule(".", "400:ExpiredToken"))
    for act in (lambda: place.open("a"), lambda: place.write_json("x", 1), place.names, lambda: place.exists("a")):
        proxy.lines.clear()
        with pytest.raises(StoreError, match=r"the credentials have expired: get fresh ones .* run again") as caught:
            act()
        assert caught.value.kind == "expired"
        assert len(proxy.lines) <= 2
        assert KEY not in str(caught.value)
        assert SECRET not in str(caught.value)


def test_credentials_of_a_profile_that_are_refreshed_in_time_let_it_carry_on(
    proxy: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    profile = "[short]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    file.write_text(profile.format(KEY, SECRET))
    place = Store("s3://data/faults/in", {"endpoint_url": proxy.endpoint, "profile": "short"})
    proxy.set_rules()
    assert place.names() == ["a", "b", "large"]
    file.write_text(profile.format(KEY, "not yet"))
    proxy.set_rules(Rule(".", "403:ExpiredToken", 3))
    pauses: list[float] = []

    def refreshed(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            file.write_text(profile.format(KEY, SECRET))

    monkeypatch.setattr(retry.time, "sleep", refreshed)
    assert place.names() == ["a", "b", "large"]
    assert len(pauses) == 3
    proxy.set_rules(Rule(".", "403:ExpiredToken"))
    with pytest.raises(StoreError, match="cannot be listed in 7 attempts"):
        place.names()


@pytest.mark.parametrize("fault", [507, "403:QuotaExceeded"])
def test_a_full_bucket_is_one_sentence_with_nothing_half_written(
    proxy: Faults, object_store: ObjectStore, fault: int | str
) -> None:
    place = store(proxy, f"full-{str(fault).replace(':', '-')}")
    for name, matching in (("small", "PUT .*small"), ("large", "PUT .*partNumber=2")):
        proxy.set_rules(Rule(matching, fault))
        with (
            pytest.raises(StoreError, match=r"the store is full: free space or raise the quota") as caught,
            place.writing(name) as file,
        ):
            file.write(BODY if name == "large" else b"x")
        assert "\n" not in str(caught.value)
    proxy.set_rules()
    assert place.names() == []
    assert unfinished(object_store, "faults/full") == []
    with place.writing("large") as file:
        file.write(BODY)
    assert place.names() == ["large"]
