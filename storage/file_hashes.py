"""The sha256 of local files, kept in the user's private cache folder, so that no listing hashes a file again.

In: files of a folder with their state: size, times of change of content and of inode, inode. Out: what was hashed while
a file had that state. Many processes may use it at once. A cache that cannot be used costs hashing, and no more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from storage.cache import cache_folder
from storage.errors import UserError

log = logging.getLogger(f"ringworld.{__name__}")

T = TypeVar("T")

_NAME = "file-hashes-1.sqlite3"  # the number is of the tables' form
_MOST_FILES = 5_000_000  # about 600 MB; the folders that were not listed for longest are left out
_SETTLED_NS = 2 * 10**9  # disks have coarse clocks: soon after a change, another may leave the same time
_WAIT_SECONDS = 5.0  # for another process that writes
_WRITTEN_AT_ONCE = 10_000  # files, in a moment: others wait meanwhile
_WRITE_SECONDS = 10.0  # so that a listing that is killed has not hashed in vain
_TABLES = """
CREATE TABLE IF NOT EXISTS folders (id INTEGER PRIMARY KEY, path TEXT UNIQUE, day INTEGER);
CREATE TABLE IF NOT EXISTS files (
    folder INTEGER, name TEXT, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, sha256 BLOB,
    PRIMARY KEY (folder, name)
) WITHOUT ROWID;
"""


class FileState(NamedTuple):
    """What changes when a file does. ctime_ns: also where its content is replaced and its mtime set back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        """From the system's."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino % 2**63)  # of SQLite's integers

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change at `now_ns` or later would show in the state."""
        return max(self.mtime_ns, self.ctime_ns) < now_ns - _SETTLED_NS


class FileHashes:
    """The cache, while a listing needs it. Use `file_hashes`."""

    def __init__(self, database: sqlite3.Connection | None) -> None:
        self._database, self._has_failed = database, False
        self._unwritten: list[tuple[str, str, FileState, str]] = []
        self._written_at, self._used = time.monotonic(), set[str]()

    def known(self, folder: str, files: Sequence[tuple[str, FileState]]) -> list[str | None]:
        """The sha256, hex, of each file of a folder in its state; None where it is not known.

        files: names and states, sorted by name, at least one.
        """
        self._used.add(folder)
        return self._attempt(lambda database: _known(database, folder, files), [None] * len(files))

    def keep(self, folder: str, name: str, state: FileState, sha256: str) -> None:
        """Keep the sha256, hex, of a file that was settled in this state when its hashing began."""
        self._unwritten.append((folder, name, state, sha256))
        is_due = time.monotonic() - self._written_at >= _WRITE_SECONDS
        if is_due or len(self._unwritten) >= _WRITTEN_AT_ONCE:
            self._write()

    def close(self) -> None:
        """Write what is left, and leave out the folders that were used longest ago, of what is too much."""
        self._write()
        today = int(time.time() // 86400)
        self._attempt(lambda database: _use(database, self._used, today), None)
        if self._database is not None:
            self._database.close()

    def _write(self) -> None:
        rows, self._unwritten = self._unwritten, []
        self._written_at = time.monotonic()
        if rows:
            self._attempt(lambda database: _write(database, rows), None)

    def _attempt(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `action` returns; `otherwise` where there is no database, or it fails."""
        if self._database is None:
            return otherwise
        try:
            with self._database:  # one transaction
                return action(self._database)
        except sqlite3.Error as error:
            if not self._has_failed:
                log.info("the sha256 of local files cannot be kept (%s), so some are hashed each time", error)
            self._has_failed = True
            return otherwise


@contextlib.contextmanager
def file_hashes() -> Iterator[FileHashes]:
    """The user's cache during the block; one that forgets where it cannot be opened."""
    hashes = FileHashes(_opened())
    try:
        yield hashes
    finally:
        hashes.close()


def _opened() -> sqlite3.Connection | None:
    try:
        path = cache_folder() / _NAME
    except UserError:
        return None
    for _ in range(2):
        try:
            database = sqlite3.connect(path, timeout=_WAIT_SECONDS)
            database.executescript(_TABLES)
        except sqlite3.OperationalError as error:  # locked, or the disk is full or read-only
            log.info("%s cannot be used (%s): local files are hashed each time", path, error)
            return None
        except sqlite3.DatabaseError:  # damaged by a power cut or a full disk
            path.unlink(missing_ok=True)
        else:
            return database
    return None


def _known(database: sqlite3.Connection, folder: str, files: Sequence[tuple[str, FileState]]) -> list[str | None]:
    rows = database.execute(
        "SELECT name, size, mtime_ns, ctime_ns, inode, sha256 FROM files WHERE folder = "
        "(SELECT id FROM folders WHERE path = ?) AND name BETWEEN ? AND ? ORDER BY name",
        (folder, files[0][0], files[-1][0]),
    )
    hashes: list[str | None] = []
    row = next(rows, None)
    for name, state in files:
        while row is not None and row[0] < name:
            row = next(rows, None)
        is_known = row is not None and row[0] == name and row[1:5] == state
        hashes.append(row[5].hex() if row is not None and is_known else None)
    return hashes


def _write(database: sqlite3.Connection, rows: Sequence[tuple[str, str, FileState, str]]) -> None:
    folders = {(folder,) for folder, *_ in rows}
    database.executemany("INSERT OR IGNORE INTO folders (path, day) VALUES (?, 0)", folders)
    database.executemany(
        "INSERT OR REPLACE INTO files VALUES ((SELECT id FROM folders WHERE path = ?), ?, ?, ?, ?, ?, ?)",
        ((folder, name, *state, bytes.fromhex(sha256)) for folder, name, state, sha256 in rows),
    )


def _use(database: sqlite3.Connection, folders: set[str], today: int) -> None:
    """Note that folders were used today, and leave out others while there is too much."""
    database.executemany(
        "UPDATE folders SET day = ? WHERE path = ? AND day < ?", ((today, folder, today) for folder in folders)
    )
    (count,) = database.execute("SELECT count(*) FROM files").fetchone()
    for (folder,) in database.execute("SELECT id FROM folders ORDER BY day, id").fetchall():
        if count <= _MOST_FILES:
            break
        count -= database.execute("DELETE FROM files WHERE folder = ?", (folder,)).rowcount
        database.execute("DELETE FROM folders WHERE id = ?", (folder,))
