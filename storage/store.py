"""The output of a run: a `Store` folder on any fsspec file system, where every write is atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put. A store with the fence of a lease, which tasks and workers receive with it, writes
nothing once another driver has the lease.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from storage.errors import UserError
from storage.local_files import TEMPORARY_PREFIX, link_file, locked, remove_temporaries, whole_file
from storage.object_store.filesystem import BucketFileSystem, S3FileSystem
from storage.object_store.multipart_uploads import abort_uploads
from storage.urls import CACHE, fetch_file, filesystem, open_ranged, open_url

log = logging.getLogger("ringworld")


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec file system. Names are relative, with `/`. Methods raise UserError on an unusable URL."""

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    fence: Callable[[], None] | None = None  # called before every change; raises where this process may not write

    @property
    def is_local(self) -> bool:
        """Whether names are plain files of this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, *parts: str) -> Store:
        """The store of a folder below this one."""
        return replace(self, url="/".join([self.url.rstrip("/"), *parts]))

    def path(self, name: str = "") -> str:
        """The URL of a name; an absolute path on a local disk."""
        if self.is_local:
            return str(Path(self.url.removeprefix("file://")).absolute() / name)
        return f"{self.url.rstrip('/')}/{name}" if name else self.url.rstrip("/")

    def open(self, name: str) -> BinaryIO:
        """Open for reading; FileNotFoundError when absent."""
        return open_url(self.path(name), self.options)

    def open_ranged(self, name: str) -> BinaryIO:
        """Open for reading at known offsets; remotely, each read is one request for exactly its bytes."""
        return self.open(name) if self.is_local else cast(BinaryIO, open_ranged(self.path(name), self.options))

    def exists(self, name: str) -> bool:
        """Whether the name holds a committed object."""
        fs, path = self._filesystem(name)
        return bool(fs.exists(path))

    def age(self, name: str) -> float:
        """Seconds since the name was last written, by the clock of this machine; FileNotFoundError when absent."""
        fs, path = self._filesystem(name)
        return (datetime.now(UTC) - fs.modified(path)).total_seconds()

    def read_bytes(self, name: str) -> bytes | None:
        """The bytes of a name, or None when it is absent."""
        with contextlib.suppress(FileNotFoundError), self.open(name) as file:
            return file.read()
        return None

    def read_json(self, name: str) -> Any | None:
        """The JSON of a name, or None when it is absent. Raises UserError where the bytes are not JSON."""
        data = self.read_bytes(name)
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            raise UserError(
                f"{self.path(name)}: {'the file is empty' if not data else 'this is not the JSON that was written'} (a "
                f"power cut, a full disk?); delete it and run again"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Commit a JSON value by one atomic put; the bytes depend on the value alone."""
        with self.writing(name) as file:
            file.write(_json_bytes(value))

    def create_json(self, name: str, value: Any) -> bool:
        """Commit a JSON value only if the name is free; False when it is taken (a hard link, or `If-None-Match` on S3).

        On a store without conditional puts, two writers that create the name at once may both get True.
        """
        try:
            with self.writing(name, exclusive=True) as file:
                file.write(_json_bytes(value))
        except FileExistsError:
            return False
        return True

    def replace_json(self, name: str, old: Any, new: Any) -> bool:
        """Commit `new` (None: remove the name) only if the name still holds `old`, and return whether it did.

        old: a JSON value that a store wrote, or bytes. Of several writers at once one gets True on a local disk and on
        a store with `If-Match`, where only removing is not conditional.
        """
        self._check_fence()
        expected = old if isinstance(old, bytes) else _json_bytes(old)
        if self.is_local:
            with locked(Path(self.path(name))) as data:
                if data != expected:
                    return False
                if new is None:
                    os.unlink(self.path(name))
                else:
                    self.write_json(name, new)
            return True
        fs, path = self._filesystem(name)
        try:
            etag = fs.info(path).get("ETag")  # read before the content, which then cannot be an older version
        except FileNotFoundError:
            return False
        if self.read_bytes(name) != expected:
            return False
        if new is None:
            fs.rm_file(path)
        elif etag and isinstance(fs, BucketFileSystem):
            return fs.replace(path, _json_bytes(new), etag)
        else:
            fs.pipe_file(path, _json_bytes(new))
        return True

    @contextlib.contextmanager
    def writing(self, name: str, exclusive: bool = False) -> Iterator[BufferedRandom]:
        """A file to write that becomes visible under its name, whole, when the block ends without an exception.

        Raises UserError where the disk is full, or where the fence forbids writing; if exclusive, FileExistsError where
        the name is taken.
        """
        with self._naming_a_full_disk():
            if self.is_local:
                with whole_file(self.path(name), self._check_fence, exclusive) as file:
                    yield file
                return
            with tempfile.TemporaryFile() as unnamed:  # so that a killed writer leaves nothing
                yield unnamed
                unnamed.flush()
                self._check_fence()
                fs, path = self._filesystem(name)
                fs.put_file(f"/dev/fd/{unnamed.fileno()}", path, **({"mode": "create"} if exclusive else {}))

    def names(self, folder: str = "") -> list[str]:
        """Names of all committed objects below a folder, sorted."""
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        return [prefix + name for name in sorted(self._listed(folder, deep=True))]

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly inside a folder, sorted."""
        return sorted(name for name, info in self._listed(folder).items() if info["type"] == "directory")

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file directly inside a folder, by name; nothing where there is none."""
        return {name: info["size"] for name, info in self._listed(folder).items() if info["type"] == "file"}

    def delete(self, name: str) -> None:
        """Remove a name if it is there."""
        self._check_fence()
        fs, path = self._filesystem(name)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with all that it holds, if it is there."""
        self._check_fence()
        fs, path = self._filesystem(folder)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    def sweep_temporaries(self, deep: bool = True, age: float = 0.0) -> int:
        """Remove what killed writers left in this folder: temporary files; on S3, unfinished uploads. Returns how many.

        Only while no other writer works here. deep: also in all folders below. age: seconds since a file was written.
        """
        self._check_fence()
        if self.is_local:
            return remove_temporaries(self.path(), deep, age)
        fs, path = self._filesystem()
        if not deep or not isinstance(fs, S3FileSystem):
            return 0
        client, prefix = fs.client(path)
        try:
            return abort_uploads(client.settings, path.partition("/")[0], f"{prefix}/")
        except (OSError, SyntaxError) as error:  # refused, or an answer that is not XML
            log.info("%s: unfinished uploads cannot be listed and aborted (%s)", self.path(), error)
            return 0

    def hashes(self, folder: str) -> dict[str, str]:
        """sha256 hex of every object below a folder, by name."""
        return {name: self.sha256(name) for name in self.names(folder)}

    def sha256(self, name: str) -> str:
        """sha256 hex of one object's bytes; FileNotFoundError when absent."""
        with self.open(name) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path to the content of a name, during the block: the file itself, or an unnamed copy.

        Raises FileNotFoundError when absent.
        """
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryFile() as unnamed:
            copy = f"/dev/fd/{unnamed.fileno()}"
            with self._naming_a_full_disk():
                fs, path = self._filesystem(name)
                fs.get_file(path, copy)
            yield Path(copy)

    def fetch_folder(self, folder: str = "", *files: str) -> Path:
        """A local copy of a folder (the folder itself where it is local), for libraries that read only local files.

        files: names within it, which alone are fetched; none given: all. Names that are absent are ignored.
        """
        fs, path = self._filesystem(folder)
        if isinstance(fs, LocalFileSystem):
            return Path(path)
        store = self.at(folder) if folder else self
        local = CACHE / hashlib.sha256(store.path().encode()).hexdigest()
        for name in store.names():
            if not files or name in files:
                link_file(local / name, fetch_file(store.path(name), self.options))
        return local

    def _filesystem(self, name: str = "") -> tuple[Any, str]:
        return filesystem(self.path(name), self.options)

    def _listed(self, folder: str, deep: bool = False) -> dict[str, dict[str, Any]]:
        """fsspec's entry of each committed name directly in a folder (deep: of each file below), by the name in it."""
        fs, path = self._filesystem(folder)
        fs.invalidate_cache()
        try:
            infos = fs.find(path, detail=True) if deep else {info["name"]: info for info in fs.ls(path, detail=True)}
        except FileNotFoundError:
            return {}
        start = len(path.rstrip("/")) + 1
        entries = {name.rstrip("/")[start:]: info for name, info in infos.items()}
        return {name: info for name, info in entries.items() if TEMPORARY_PREFIX not in name}

    def _check_fence(self) -> None:
        if self.fence:
            self.fence()

    @contextlib.contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if self.is_local:
                raise UserError(f"{self.path()}: the disk is full; free space or set storage.root elsewhere") from None
            raise UserError(
                f"{tempfile.gettempdir()}: the disk is full, where files are made before they are put in "
                f"{self.path()}; free space or set TMPDIR elsewhere"
            ) from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
