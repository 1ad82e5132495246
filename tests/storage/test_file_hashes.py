"""The sha256 of a local file is computed once for each state of it, and never taken for that of another."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from storage import file_hashes as cache
from storage.errors import UserError
from storage.file_hashes import FileState, file_hashes
from storage.local_listing import _hashed
from storage.urls import list_objects
from testing.miniature import ROOT


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, where files count as settled although they were just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**12))
    return tmp_path / "cache" / "ringworld" / cache._NAME


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed."""
    names: list[str] = []

    def hash_and_note(folder: str, name: str, *rest: object) -> str:
        names.append(name)
        return _hashed(folder, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("storage.local_listing._hashed", hash_and_note)
    return names


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def etags(folder: Path, pattern: str = "**/*.txt") -> dict[str, str]:
    return {Path(one.url).name: one.etag for one in list_objects(f"{folder}/{pattern}")}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.txt")}


@pytest.mark.usefixtures("database")
def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, hashed: list[str]) -> None:
    data = fill(tmp_path / "data", "a.txt", "b.txt", "deep/c.txt", "deep/é\U0001f600.txt")
    first = etags(data)
    assert first == contents(data)
    assert sorted(hashed) == sorted(first)
    hashed.clear()
    assert etags(data) == first
    assert etags(data, "deep/c.txt") == {"c.txt": first["c.txt"]}
    assert hashed == []
    fill(data, "aa.txt")
    (data / "b.txt").write_text("TEXT of b.txt")
    (data / "deep/c.txt").unlink()
    assert etags(data) == contents(data)
    assert hashed == ["aa.txt", "b.txt"]


@pytest.mark.usefixtures("database")
def test_a_file_of_the_same_size_and_time_is_hashed_again_where_its_content_was_replaced(
    tmp_path: Path, hashed: list[str]
) -> None:
    data = fill(tmp_path / "data", "a.txt", "b.txt")
    etags(data)
    hashed.clear()
    before = (data / "a.txt").stat()
    (data / "a.txt").write_text("TEXT OF a.txt")
    os.utime(data / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    (data / "new").write_text("TEXT of b.txt")
    os.utime(data / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(data / "new", data / "b.txt")
    assert etags(data) == contents(data)
    assert hashed == ["a.txt", "b.txt"]


@pytest.mark.parametrize(("mtime", "ctime", "is_settled"), [(-2.1, -2.1, True), (-1.9, -9, False), (-9, 0, False)])
def test_what_changed_shortly_before_it_was_hashed_is_not_settled(mtime: float, ctime: float, is_settled: bool) -> None:
    now = 10**18
    assert FileState(1, now + int(mtime * 1e9), now + int(ctime * 1e9), 1).is_settled(now) == is_settled


def test_a_file_that_was_just_written_is_hashed_each_time(
    tmp_path: Path, database: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", 10**12)
    data = fill(tmp_path / "data", "a.txt")
    assert etags(data) == etags(data) == contents(data)
    assert hashed == ["a.txt", "a.txt"]
    with sqlite3.connect(database) as kept:
        assert kept.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_the_cache_is_private_and_bounded_by_leaving_out_what_was_used_longest_ago(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MOST_FILES", 3)
    fill(tmp_path, "old/a.txt", "old/b.txt", "used/c.txt", "new/d.txt", "new/e.txt")
    etags(tmp_path / "old")
    etags(tmp_path / "used")
    with sqlite3.connect(database) as kept:
        kept.execute("UPDATE folders SET day = day - 1")
    etags(tmp_path / "used")
    etags(tmp_path / "new")
    with sqlite3.connect(database) as kept:
        assert sorted(kept.execute("SELECT name FROM files")) == [("c.txt",), ("d.txt",), ("e.txt",)]
        assert [Path(path).name for (path,) in kept.execute("SELECT path FROM folders ORDER BY path")] == [
            "new",
            "used",
        ]
    assert stat.S_IMODE(database.parent.stat().st_mode) == 0o700


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_costs_hashing(
    tmp_path: Path, database: Path, hashed: list[str]
) -> None:
    data = fill(tmp_path / "data", "a.txt")
    database.parent.mkdir(parents=True)
    database.write_bytes(b"this is no database " * 1000)
    assert etags(data) == etags(data) == contents(data)
    assert hashed == ["a.txt"]
    database.unlink()
    database.mkdir()
    assert etags(data) == contents(data)
    assert hashed == ["a.txt", "a.txt"]


@pytest.mark.slow
def test_many_processes_use_the_cache_at_once(tmp_path: Path, database: Path) -> None:
    data = fill(tmp_path / "data", *(f"{number % 7}/{number}.txt" for number in range(700)))
    script = (
        "import sys; from storage import file_hashes as cache; from storage.urls import list_objects; "
        "cache._SETTLED_NS, cache._WRITTEN_AT_ONCE = -10**12, 10; "
        "print(sum(int(one.etag, 16) for one in list_objects(sys.argv[1] + '/**/*.txt')))"
    )
    command = [sys.executable, "-c", script, str(data)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=120)[0].strip() for process in running}
    assert sums == {str(sum(int(etag, 16) for etag in contents(data).values()))}
    with sqlite3.connect(database) as kept:
        assert kept.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert kept.execute("SELECT count(*) FROM files").fetchone() == (700,)
    with file_hashes() as hashes:
        state = FileState.of((data / "0/0.txt").stat())
        assert hashes.known(f"{data}/0/", [("0.txt", state)]) == [contents(data)["0.txt"]]


def test_what_is_removed_while_a_folder_is_listed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)

    def remove_and_hash(folder: str, name: str, path: str, hashes: object) -> str:
        Path(path).unlink()
        return Path(path).read_text()

    monkeypatch.setattr("storage.local_listing._hashed", remove_and_hash)
    with pytest.raises(UserError, match="no such file or object"):
        list_objects(f"{tmp_path}/*.txt")
