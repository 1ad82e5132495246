"""A bucket is listed by many requests at once, and the listing is the same as by one request after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import files
from storage.object_store import listing
from storage.urls import NothingFoundError, ObjectInfo, list_objects
from testing.cloud_stores import CloudStore, Kept, cloud_store
from testing.http_server import http_server
from testing.listed_bucket import BucketHandler, ListedBucket, listed_bucket
from testing.s3_server import ObjectStore

PARTS = st.sampled_from(["a", "b", "a-", "B.mp4", "c.mp4"])
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize("per_folder", [0, 20, 700, 5000])
def test_all_objects_are_listed_whatever_the_size_of_folders(per_folder: int) -> None:
    bucket = ListedBucket(9001, per_folder)
    with listed_bucket(bucket) as options:
        found = list_objects("s3://data/clips/**/*.mp4", options)
        ones = list_objects(f"s3://data/clips/{'*/' if per_folder else ''}*01.mp4", options)
    keys = [f"s3://data/{bucket.key(number)}" for number in range(bucket.objects)]
    assert found.urls == keys
    assert (found.sizes[:3], len(set(found.etags))) == ([1, 2, 3], 9001)
    assert ones.urls == [key for key in keys if key.endswith("01.mp4")]


def test_many_folders_are_asked_for_at_once() -> None:
    active, most, lock = 0, 0, threading.Lock()

    class Counting(BucketHandler):
        def do_GET(self) -> None:  # noqa: N802
            nonlocal active, most
            with lock:
                active += 1
                most = max(most, active)
            super().do_GET()
            with lock:
                active -= 1

    with http_server(partial(Counting, ListedBucket(12_000, 400, latency=0.1))) as address:
        for pattern in ("clips/**/*.mp4", "clips/*/*.mp4", "clips/{000000..000023}/*01.mp4"):
            most = 0
            list_objects(f"s3://data/{pattern}", {"endpoint_url": address, "anon": True})
            assert 8 <= most <= 32


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudStore]:
    """A store whose keys may be any, also those by which consoles mark folders."""
    with cloud_store("gs", tmp_path_factory.mktemp("google")) as store:
        yield store


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    pattern=st.sampled_from(["**", "a/**", "**/*.mp4", "*/*", "a/*/*.mp4", "*/a*/**/*.mp4"]),
    keys=st.dictionaries(KEYS | KEYS.map("{}/".format), st.booleans(), max_size=12),
)
def test_a_listing_cut_by_folders_is_that_of_one_piece(
    google: CloudStore, pattern: str, keys: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    google.objects = {key: Kept(b"x" if is_full else b"") for key, is_full in keys.items()}

    def listed(pages: int, page: int) -> list[ObjectInfo]:
        with monkeypatch.context() as patched:
            patched.setattr(listing, "_SAMPLE_PAGES", pages)
            patched.setattr(listing, "_PAGE", page)
            try:
                return list(list_objects(f"gs://data/{pattern}", google.options))
            except NothingFoundError:
                return []

    assert listed(1, 1) == listed(1, 2) == listed(4, 1000)


def test_a_real_store_lists_the_same_cut_by_folders(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"cut/{folder}/{number}.md" for folder in ("a", "b/c", "b/d") for number in range(7)]
    for name in (*names, "cut/top.md"):
        object_store.fs.pipe_file(f"data/{name}", b"x")
    monkeypatch.setattr(listing, "_SAMPLE_PAGES", 1)
    monkeypatch.setattr(listing, "_PAGE", 5)
    found = list_objects("s3://data/cut/**/*.md", object_store.options)
    assert found.urls == sorted(f"s3://data/{name}" for name in (*names, "cut/top.md"))


def test_a_long_listing_says_how_many_there_are_so_far(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="ringworld")
    with listed_bucket(ListedBucket(3000)) as options:
        list_objects("s3://data/clips/**/*.mp4", options)
        assert caplog.messages == []
        monkeypatch.setattr(files, "_LOG_SECONDS", 0.0)
        list_objects("s3://data/clips/**/*.mp4", options)
    assert caplog.messages[-1] == "listing s3://data/clips/**/*.mp4: 3,000 objects"
