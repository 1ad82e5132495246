"""Object stores through our own door, on a real S3 server: listed, read and written as s3fs would, and atomically."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import UserError
from storage.object_store.errors import StoreError
from storage.remote_file import FIRST, LARGEST
from storage.store import Store
from storage.urls import fetch_file, filesystem, list_objects, open_url
from testing.faulty_proxy import Faults
from testing.s3_server import ObjectStore

pytestmark = pytest.mark.slow

BODY = np.random.default_rng(1).bytes(40 * 10**6)
NAMES = ["a b", "ü", "a%20b", "h#sh", "q?x", "pl+us", "til~de", "br[a]c", "cu{r}ly", "a&b=c", "x:y@z", "'\"$"]


@pytest.fixture(scope="module")
def filled(object_store: ObjectStore) -> ObjectStore:
    """More objects than a page of a listing holds, names of every kind, and a large object."""
    fs = object_store.fs
    names = [f"data/listed/{folder}/{number:04d}.md" for folder in ("aa", "ab") for number in range(550)]
    names += ["data/listed/top.md", "data/listed/aa/deep/er/x.md", "data/listed/aa.md", "data/listed-not/top.md"]
    ours, _ = filesystem(object_store.url, object_store.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: ours.pipe_file(name, name.encode()), names))
    for name in NAMES:
        fs.pipe_file(f"data/names/{name}", name.encode())
    fs.pipe_file("data/large", BODY)
    return object_store


@pytest.mark.parametrize(
    "pattern",
    ["listed/*/*.md", "listed/**/*.md", "listed/a?/00[01]*.md", "listed/*", "listed/top.md"],
)
def test_the_same_objects_are_listed_as_s3fs_lists(filled: ObjectStore, pattern: str) -> None:
    found = list_objects(f"s3://data/{pattern}", filled.options)
    filled.fs.invalidate_cache()
    path = f"data/{pattern}"
    theirs = filled.fs.glob(path, detail=True) if set("*?[{") & set(pattern) else {path: filled.fs.info(path)}
    assert [(one.url, one.size, one.etag) for one in found] == [
        (f"s3://{name}", info["size"], info["ETag"].strip('"'))
        for name, info in sorted(theirs.items())
        if info["type"] == "file"
    ]


def test_names_and_folders_of_a_store_are_those_below_it_alone(filled: ObjectStore) -> None:
    store = Store("s3://data/listed", filled.options)
    assert len(store.names()) == 1103
    assert store.folders() == ["aa", "ab"]
    assert store.names("aa/deep") == ["aa/deep/er/x.md"]
    assert store.names("nothing") == []
    assert store.exists("top.md")
    assert not store.exists("top")


def test_objects_of_any_name_are_read_and_written(filled: ObjectStore) -> None:
    store = Store("s3://data/names", filled.options)
    assert store.names() == sorted(NAMES)
    for name in NAMES:
        with store.open(name) as file:
            assert file.read() == name.encode()
        store.write_json(f"copies/{name}", name)
        assert store.read_json(f"copies/{name}") == name
    with pytest.raises(UserError, match="give the object another name"):
        store.exists("two//slashes")


def test_a_stream_reads_ahead_in_blocks_that_grow_to_a_bound(filled: ObjectStore) -> None:
    proxy = Faults.before(filled.endpoint)
    with open_url("s3://data/large", {**filled.options, "endpoint_url": proxy.endpoint}) as file:
        got = bytearray()
        while piece := file.read(300_000):
            got += piece
            held: Any = file.raw  # type: ignore[attr-defined]
            assert sum(len(piece) for block in held._blocks for piece in block.pieces) <= 3 * LARGEST
    assert got == BODY
    asked = sorted(tuple(map(int, asked.split("-"))) for asked in proxy.ranges)
    assert asked[0] == (0, FIRST - 1)
    assert asked[-1][1] == len(BODY) - 1
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(asked)), "every byte once"
    assert max(end - start + 1 for start, end in asked) == LARGEST


def test_a_jump_costs_one_small_block(filled: ObjectStore) -> None:
    proxy = Faults.before(filled.endpoint)
    with open_url("s3://data/large", {**filled.options, "endpoint_url": proxy.endpoint}) as file:
        for place in (30_000_000, 5, 20_000_000):
            assert file.seek(place) == place
            assert file.read(100) == BODY[place : place + 100]
        assert file.seek(-7, io.SEEK_END) == len(BODY) - 7
        assert file.read() == BODY[-7:]
        assert file.read(1) == b""
    assert len(proxy.ranges) == 4
    assert all(int(end) - int(start) < FIRST for start, end in (asked.split("-") for asked in proxy.ranges))


def test_an_empty_object_and_none(filled: ObjectStore) -> None:
    filled.fs.pipe_file("data/empty", b"")
    with open_url("s3://data/empty", filled.options) as file:
        assert file.read() == b""
    for url in ("s3://data/none", "s3://no-bucket-here/none"):
        with pytest.raises(FileNotFoundError, match=url):
            open_url(url, filled.options)


def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(filled: ObjectStore) -> None:
    filled.fs.pipe_file("data/replaced", BODY[: 4 * FIRST])
    with open_url("s3://data/replaced", filled.options) as file:
        assert file.read(10) == BODY[:10]
        filled.fs.pipe_file("data/replaced", bytes(4 * FIRST))
        with pytest.raises(StoreError, match=r"^s3://data/replaced: .* the object was replaced while it was read"):
            file.read()


def test_a_large_object_is_put_by_parts_and_fetched_whole(filled: ObjectStore) -> None:
    store = Store("s3://data/written", filled.options)
    with store.writing("large") as file:
        file.write(BODY)
        assert store.names() == []
    (info,) = list_objects("s3://data/written/large", filled.options)
    assert info.size == len(BODY)
    assert info.etag.endswith("-4"), "parts of 8 MiB and what is left over"
    assert fetch_file("s3://data/written/large", filled.options).read_bytes() == BODY
    store.delete("large")
    store.delete("large")
    assert store.names() == []


def test_a_name_is_taken_once_and_replaced_only_by_who_knows_what_it_holds(filled: ObjectStore) -> None:
    store = Store("s3://data/taken", filled.options)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda number: store.create_json("lock", number), range(8))) == 1
    held = store.read_json("lock")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda number: store.replace_json("lock", held, 100 + number), range(8))) == 1
    assert store.read_json("lock") >= 100
    assert not store.replace_json("lock", held, None)
    assert store.replace_json("lock", store.read_json("lock"), None)
    assert not store.replace_json("lock", None, 1)
    assert store.read_json("lock") is None


def test_unfinished_uploads_below_a_folder_are_ended_and_no_others(filled: ObjectStore) -> None:
    call = filled.fs.call_s3
    for name in ("uploads/ü b/1", "uploads/2", "uploads-not/3"):
        upload = call("create_multipart_upload", Bucket="data", Key=name)["UploadId"]
        call("upload_part", Bucket="data", Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    assert Store("s3://data/uploads", filled.options).sweep_temporaries() == 2
    assert Store("s3://data/uploads", filled.options).sweep_temporaries() == 0
    left = call("list_multipart_uploads", Bucket="data")["Uploads"]
    assert [upload["Key"] for upload in left] == ["uploads-not/3"]


def test_a_killed_writer_leaves_no_file_on_its_disk_and_nothing_in_the_bucket(
    filled: ObjectStore, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys; sys.modules['s3fs'] = sys.modules['botocore'] = None  # not needed\n"
        "from storage.store import Store\n"
        f"with Store('s3://data/killed', {filled.options!r}).writing('shards/0.tar') as file:\n"
        "    file.write(bytes(10**6)); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert Store("s3://data/killed", filled.options).names() == []


def test_a_fetched_file_is_whole_though_another_process_was_killed_amid_it(filled: ObjectStore) -> None:
    filled.fs.pipe_file("data/fetched", BODY[:1000])
    local = fetch_file("s3://data/fetched", filled.options)
    left, young = local.with_name(".tmp-left"), local.with_name(".tmp-young")
    for part in (left, young):
        part.write_bytes(b"half")
    os.utime(left, (time.time() - 3600,) * 2)
    local.unlink()
    assert fetch_file("s3://data/fetched", filled.options).read_bytes() == BODY[:1000]
    assert not left.exists()
    assert young.exists(), "of a process that fetches just now"


def test_a_client_that_knows_only_fsspec_removes_and_copies_folders(filled: ObjectStore, tmp_path: Path) -> None:
    fs, root = filesystem("s3://data/folder", filled.options)
    (tmp_path / "x").write_bytes(b"x")
    for name in ("1/a", "1/b", "2"):
        fs.put_file(str(tmp_path / "x"), f"{root}/{name}")
    assert [(one["name"], one["type"]) for one in fs.ls(root, detail=True)] == [
        ("data/folder/1", "directory"),
        ("data/folder/2", "file"),
    ]
    assert fs.isdir(f"{root}/1")
    assert fs.isfile(f"{root}/2")
    fs.get_file(f"{root}/1/a", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == b"x"
    fs.rm(f"{root}/1", recursive=True)
    assert fs.find(root) == ["data/folder/2"]
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{root}/1", recursive=True)


def test_uploads_that_dead_writers_left_are_aborted_below_a_folder_and_in_a_whole_bucket(filled: ObjectStore) -> None:
    Store("s3://data", filled.options).sweep_temporaries()  # of the tests before
    for key in [*(f"left/{name}" for name in NAMES), "left-not/1.tar"]:
        filled.fs.call_s3("create_multipart_upload", Bucket="data", Key=key)
    assert Store("s3://data/left", filled.options).sweep_temporaries() == len(NAMES)
    assert Store("s3://data", filled.options).sweep_temporaries() == 1
    assert filled.fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads", []) == []
