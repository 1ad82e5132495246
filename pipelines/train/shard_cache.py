"""Whole shards on a node's local disk, within a bound, shared by the node's processes.

In: a folder, a bound in bytes, and what opens a shard in the object store. Out: open files. A shard enters the cache
when it is first opened, if there is room: it is fetched once a node, re-hashed, and appears whole, under its sha256, by
one rename. Only shards that were not opened for `IDLE_SECONDS` make room, the least recently used first: over data
larger than the cache, a shuffled order would otherwise fetch whole shards for single sequences. What does not fit is
read by ranges. A process re-hashes a shard that it did not fetch before its first use, so that a disk's errors cost a
fetch. An open file outlives its removal, as always on POSIX systems.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from storage.errors import BadData
from storage.local_files import alone
from tokenization.loader.shard_reader import Opener
from tokenization.shards.index import ShardStats
from tokenization.shards.shard import hash_file

IDLE_SECONDS = 900.0
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ShardCache:
    """folder: on a local disk; made when absent. limit: bytes of all shards in it. idle: seconds until one may go."""

    folder: Path
    limit: int
    idle: float = IDLE_SECONDS
    _checked: set[Path] = field(default_factory=set, repr=False)

    def open(self, remote: Opener, name: str, stats: ShardStats) -> BinaryIO:
        """The shard from the cache, or as `remote` opens it where there is no room.

        Raises BadData where the fetched bytes are not those of `stats`, and what `remote` raises.
        """
        path = self.folder / f"{stats.sha256}.tar"
        return self._cached(path) or self._fetched(remote, name, stats, path) or remote(name)

    def _cached(self, path: Path) -> BinaryIO | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if path not in self._checked and hash_file(file) != path.stem:
            file.close()
            path.unlink(missing_ok=True)
            return None
        file.seek(0)
        self._checked.add(path)
        os.utime(file.fileno())  # when it was last opened
        return file

    def _fetched(self, remote: Opener, name: str, stats: ShardStats, path: Path) -> BinaryIO | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock")):  # one process fetches, the others of the node wait for it
            if file := self._cached(path):
                return file
            part = path.with_suffix(".part")
            with alone(self.folder / "room.lock"):
                part.unlink(missing_ok=True)  # of a process that was killed
                if not self._make_room(stats.bytes):
                    return None
                with part.open("wb") as reserved:
                    reserved.truncate(stats.bytes)  # counts from now on, though it takes no room yet
            try:
                with remote(name) as source, part.open("r+b") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
                    target.truncate()
                    found = hash_file(target)
                if found != stats.sha256:
                    raise BadData(f"its sha256 is {found}, the manifest says {stats.sha256}: make the shard again")
                os.replace(part, path)
                self._checked.add(path)
            finally:
                part.unlink(missing_ok=True)
            return self._cached(path)

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes fit, after removing what has been idle if that is enough."""
        shards = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".part"):
                    shards.append((path.stat().st_mtime, path.stat().st_size, path))
        missing = sum(n_bytes for _, n_bytes, _ in shards) + size - self.limit
        leaving = []
        for opened_at, n_bytes, path in sorted(shards):
            if missing <= 0 or opened_at > time.time() - self.idle:
                break
            missing -= n_bytes
            leaving.append(path)
        if missing > 0:
            return False
        for path in leaving:
            path.unlink(missing_ok=True)
        return True
