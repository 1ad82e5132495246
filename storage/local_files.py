"""Whole files on a local disk: written beside their place, synced, and renamed into it, the folder synced too.

So a file is there as it was written or not at all, after a kill and after a power cut. What a killed writer leaves is a
file whose name begins with `TEMPORARY_PREFIX`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def whole_file(target: str | Path, before_commit: Callable[[], object] = lambda: None) -> Iterator[BufferedRandom]:
    """A file to write that takes its place, whole, when the block ends without an exception.

    before_commit: called when all is written, just before that; what it raises keeps the file from its place.
    """
    with _temporary(target) as (file, temporary):
        yield file
        _sync(file)
        os.chmod(temporary, 0o644)
        before_commit()
        os.replace(temporary, target)
        _sync_folder(target)


def create_file(target: str | Path, data: bytes) -> bool:
    """Put a file in a place that is free; False where it is taken. Of several at once one succeeds."""
    with _temporary(target) as (file, temporary):
        file.write(data)
        _sync(file)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        _sync_folder(target)
        return True


def link_file(target: str | Path, source: Path) -> None:
    """Put a symbolic link to `source` in a place, taken or not."""
    with _temporary(target) as (_, temporary):
        os.unlink(temporary)
        os.symlink(source, temporary)
        os.replace(temporary, target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bytes | None]:
    """What a file holds (None: it is not there), while no other process that locks it replaces it."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield file.read()
                return


def remove_temporaries(folder: str | Path, deep: bool = True, age: float = 0.0) -> int:
    """Remove what killed writers left in a folder, and, if deep, in all below it; how many files that were.

    age: seconds for which a file must not have been written to.
    """
    glob = Path(folder).rglob if deep else Path(folder).glob
    return sum(_remove_if_older(path, age) for path in list(glob(f"{TEMPORARY_PREFIX}*")))


def _remove_if_older(path: Path, age: float) -> bool:
    try:
        if time.time() - path.lstat().st_mtime < age:
            return False
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _temporary(target: str | Path) -> Iterator[tuple[BufferedRandom, str]]:
    """An open file beside `target`, and its name, which is removed at the end if it is still there."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _sync(file: BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(target: str | Path) -> None:
    """Without it a power cut may undo a rename."""
    folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot
            os.fsync(folder)
    finally:
        os.close(folder)
