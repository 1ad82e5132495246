"""Copies of remote files: in a folder of the user's own, used again only as they were fetched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from storage import cache
from storage.cache import cache_folder
from storage.errors import UserError
from storage.store import Store
from storage.urls import fetch_file, filesystem

CONTENT = b"weights"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"memory://{tmp_path.name}/model.bin"
    put(url, CONTENT)
    return url


def put(url: str, content: bytes) -> None:
    fs, path = filesystem(url, {})
    fs.pipe_file(path, content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def forget() -> None:
    """As another process, which has hashed nothing yet."""
    cache._HASHED.clear()


def test_copies_are_in_the_users_cache_folder_which_nobody_else_may_enter(home: Path, url: str) -> None:
    local = fetch_file(url)
    assert local.read_bytes() == CONTENT
    assert local.name == "model.bin"
    assert local.parent.parent == home / "cache" / "ringworld"
    assert mode(local.parent.parent) == 0o700
    (home / "cache" / "ringworld").chmod(0o755)
    assert cache_folder() == home / "cache" / "ringworld"
    assert mode(cache_folder()) == 0o700
    assert cache_folder(on_local_disk=True) == home / "tmp" / f"ringworld-cache-{os.geteuid()}"
    assert mode(cache_folder(on_local_disk=True)) == 0o700


@pytest.mark.parametrize("given", ["", "relative/path"])
def test_without_a_usable_xdg_cache_home_they_are_below_the_home(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(home))
    assert cache_folder() == home / ".cache" / "ringworld"
    monkeypatch.setenv("HOME", "/proc/none")
    assert cache_folder() == home / "tmp" / f"ringworld-cache-{os.geteuid()}"


@pytest.mark.parametrize("damage", ["changed", "cut", "without its hash", "a link", "another user's"])
def test_a_damaged_or_foreign_copy_is_fetched_again(tmp_path: Path, url: str, damage: str) -> None:
    local = fetch_file(url)
    record = local.with_name("model.bin.sha256")
    if damage == "changed":
        local.write_bytes(b"Weights")
    elif damage == "cut":
        local.write_bytes(b"")
    elif damage == "without its hash":
        local.write_bytes(b"evil")
        record.unlink()
    elif damage == "a link":
        local.unlink()
        (tmp_path / "evil").write_bytes(CONTENT)
        local.symlink_to(tmp_path / "evil")
    elif os.geteuid() == 0:
        os.chown(local, 12345, 12345)
    forget()
    assert fetch_file(url) == local
    assert local.read_bytes() == CONTENT
    assert not local.is_symlink()
    assert local.stat().st_uid == os.geteuid()


def test_a_copy_that_changes_while_the_process_runs_is_fetched_again_and_a_whole_one_is_not(url: str) -> None:
    local = fetch_file(url)
    first = local.stat().st_ino
    forget()
    assert fetch_file(url).stat().st_ino == first
    local.write_bytes(b"damaged")
    assert fetch_file(url).read_bytes() == CONTENT


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_cache_folder_of_another_user_or_behind_anothers_link_is_not_used(home: Path, url: str) -> None:
    own, temporary = home / "cache" / "ringworld", home / "tmp" / f"ringworld-cache-{os.geteuid()}"
    own.mkdir(parents=True)
    os.chown(own, 12345, 12345)
    assert fetch_file(url).parent.parent == temporary
    (home / "mine").mkdir()
    temporary.rename(home / "away")
    temporary.symlink_to(home / "mine")
    os.lchown(temporary, 12345, 12345)
    with pytest.raises(
        UserError, match="or it is another user's; set XDG_CACHE_HOME to a folder of your own"
    ) as caught:
        fetch_file(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n" * 300 + ".bin", "ü" * 200, "a b#%25.bin", ".tmp-x", "-"])
def test_a_file_of_any_name_is_fetched(tmp_path: Path, name: str) -> None:
    url = f"memory://{tmp_path.name}/{name}"
    put(url, CONTENT)
    local = fetch_file(url)
    assert local.read_bytes() == CONTENT
    assert local.name.endswith(name[-4:]), "libraries look at it"
    assert fetch_file(url) == local


def test_a_folder_that_changed_is_another_folder_with_nothing_of_the_old_one(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}/folder")
    store.write_json("a/one", 1)
    store.write_json("two", 2)
    before = store.fetch_folder()
    store.delete("two")
    store.write_json("a/one", 11)
    after = store.fetch_folder()
    assert (before / "a" / "one").read_text() == "1\n"
    assert (before / "two").read_text() == "2\n"
    assert (after / "a" / "one").read_text() == "11\n"
    assert not (after / "two").exists()
    assert sorted(path.name for path in store.fetch_folder("a", "one", "none").iterdir()) == ["one"]


def test_a_full_disk_is_one_sentence_and_leaves_no_copy(home: Path) -> None:
    script = (
        "import resource\nfrom storage.errors import UserError\nfrom storage.urls import fetch_file, filesystem\n"
        "fs, path = filesystem('memory://full/big', {})\nfs.pipe_file(path, bytes(10**6))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    fetch_file('memory://full/big')\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (said,) = done.stdout.splitlines()
    assert said.startswith(f"{home}/cache/ringworld: the disk is full")
    assert [path for path in (home / "cache").rglob("*") if path.is_file()] == []
