"""A store in a bucket of a real S3 server: leases, whole writes, and what is said where it does not open."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import pytest

from storage import lease as leases
from storage.errors import UserError
from storage.lease import LEASE, lease
from storage.store import Store
from storage.urls import list_objects
from testing.s3_server import ObjectStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(object_store: ObjectStore) -> dict[str, Any]:
    return object_store.options


def test_one_driver_holds_a_folder_in_the_bucket(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "WATCH_SECONDS", 0.1)
    store = Store("s3://data/held", options)
    with lease(store):
        with pytest.raises(UserError, match="another driver"), lease(store):
            pass
        assert store.exists(LEASE)
    assert not store.exists(LEASE)
    dead = {"owner": "x", "host": "elsewhere", "pid": 1, "beat": 0.0}
    assert store.create_json(LEASE, dead)
    with lease(store):
        assert store.read_json(LEASE)["owner"] != "x"


def test_a_write_is_whole_or_absent_and_a_name_is_taken_once(options: dict[str, Any]) -> None:
    store = Store("s3://data/writes", options)
    with contextlib.suppress(RuntimeError), store.writing("a/b") as file:
        file.write(b"half")
        raise RuntimeError
    assert store.names() == []
    with store.writing("a/b") as file:
        file.write(bytes(6 * 2**20))
    assert store.sha256("a/b") == hashlib.sha256(bytes(6 * 2**20)).hexdigest()
    assert store.names() == ["a/b"]
    assert store.folders() == ["a"]
    assert store.create_json("lock", 1)
    assert not store.create_json("lock", 2)
    assert store.read_json("lock") == 1


def test_many_names_are_removed_in_bulk_whatever_they_are_called(options: dict[str, Any]) -> None:
    store = Store("s3://data/many", options)
    names = ["a b/c&d<e>.json", "\u00e9/+%20.json", *(f"n/{number}" for number in range(30))]
    for name in [*names, "left"]:
        store.write_json(name, 1)
    assert store.sizes(deep=True) == dict.fromkeys(sorted([*names, "left"]), 2)
    store.delete_many([*names, "absent"])
    assert store.names() == ["left"]
    store.delete_many([])


@pytest.mark.parametrize(
    ("pattern", "changes", "said"),
    [
        ("s3://no-such-bucket/*.md", {}, r"s3://no-such-bucket/\*\.md: no such file or object"),
        ("s3://no-such-bucket/a.md", {}, r"s3://no-such-bucket/a\.md: no such file or object"),
        ("s3://data/none/*.md", {}, r"s3://data/none/\*\.md: no such file or object"),
        ("s3://data/*", {"secret": "wrong"}, r"s3://data/\*: cannot be used .*; check the path or bucket"),
        ("s3://data/*", {"endpoint_url": "http://127.0.0.1:9"}, r"s3://data/\*: cannot be used .*; check the path"),
    ],
)
def test_a_bucket_that_is_not_there_or_does_not_open_is_named(
    options: dict[str, Any], pattern: str, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        list_objects(pattern, {**options, **changes, "config_kwargs": {"retries": {"max_attempts": 1}}})
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_named(options: dict[str, Any]) -> None:
    with (
        pytest.raises(UserError, match=r"^s3://data/x: cannot be used"),
        lease(Store("s3://data/x", {**options, "secret": "wrong"})),
    ):
        pass
