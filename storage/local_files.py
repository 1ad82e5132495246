"""Whole files on a local disk: written beside their place, synced, and renamed into it, the folder synced too.

After a kill or a power cut a file is there as it was written or not at all. A killed writer leaves a file whose name
begins with `TEMPORARY_PREFIX`.
"""

from __future__ import annotations

import contextlib
import errno
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
def whole_file(
    target: str | Path, before_commit: Callable[[], object] = lambda: None, exclusive: bool = False
) -> Iterator[BufferedRandom]:
    """A file to write that takes its place, whole, when the block ends without an exception.

    before_commit: called when everything is written, just before that; an error that it raises prevents it. exclusive:
    raise FileExistsError where the place is taken, so that of several writers at once one succeeds.
    """
    with _temporary(target) as (file, temporary):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        before_commit()
        (os.link if exclusive else os.replace)(temporary, target)
        folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some network disks cannot
                os.fsync(folder)  # without it a power cut may undo the rename
        finally:
            os.close(folder)


def link_file(target: str | Path, source: Path) -> None:
    """Put a symbolic link to `source` in a place, taken or not."""
    with _temporary(target) as (_, temporary):
        os.unlink(temporary)
        os.symlink(source, temporary)
        os.replace(temporary, target)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other thread or process of the node is in a block with this folder or file; a file is made and stays.

    The kernel releases the lock of a process that is killed. On a network disk without locks nobody waits.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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


def is_temporary(name: str) -> bool:
    """Whether a name below a folder is that of a half-written file, or of a file in a half-written folder."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in name.split("/"))


def remove_temporaries(folder: str | Path, deep: bool = True, age: float = 0.0) -> int:
    """Remove what killed writers left in a folder (deep: and below it) at least `age` seconds ago. Returns how many."""
    glob = Path(folder).rglob if deep else Path(folder).glob
    removed = 0
    for path in list(glob(f"{TEMPORARY_PREFIX}*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime >= age:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


@contextlib.contextmanager
def _temporary(target: str | Path) -> Iterator[tuple[BufferedRandom, str]]:
    """An open file beside `target`, and its name, which is removed at the end if it is still there."""
    folder = os.path.dirname(target)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # which would say that the target is taken
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
