"""The output of a run: a `Store` folder on any fsspec file system, where every write is atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put, which is atomic there. A store that a lease fences writes nothing once the lease is
another's; it travels to tasks and workers with its fence.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, cast

from storage.errors import UserError
from storage.local_files import TEMPORARY_PREFIX, create_file, link_file, locked, remove_temporaries, whole_file
from storage.object_store.errors import StoreError
from storage.object_store.filesystem import BucketFileSystem, S3FileSystem
from storage.object_store.multipart_uploads import end_uploads
from storage.urls import CACHE, fetch_file, filesystem, open_ranged, open_url

log = logging.getLogger("ringworld")


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec file system. Names are relative, with `/`. Methods raise UserError on an unusable URL.

    fence: called before every change, and raises where this process may no longer make any.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    fence: Callable[[], None] | None = None

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
        written: datetime.datetime = fs.modified(path)
        return (datetime.datetime.now(datetime.UTC) - written).total_seconds()

    def read_bytes(self, name: str) -> bytes | None:
        """What a name holds, or None when it is absent."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any | None:
        """The JSON of a name, or None when it is absent. Raises UserError where it holds no JSON."""
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
        """Commit a JSON value only if the name is free; False when it is taken (`O_EXCL`, or `If-None-Match` on S3).

        A store without conditional puts is asked first: there, two that create at once may both be told True.
        """
        data = _json_bytes(value)
        self._check_fence()
        if self.is_local:
            with self._naming_a_full_disk():
                return create_file(self.path(name), data)
        fs, path = self._filesystem(name)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except StoreError as error:
            if error.kind != "unsupported":
                raise
            if fs.exists(path):
                return False
            fs.pipe_file(path, data)
        return True

    def replace_json(self, name: str, old: Any, new: Any) -> bool:
        """Commit `new` (None: remove the name) only if the name still holds `old`; whether it did.

        old: a JSON value, or the bytes of what is none. One of several at once is told True on a local disk, and on a
        store with `If-Match`, but for removing there.
        """
        self._check_fence()
        if self.is_local:
            with locked(Path(self.path(name))) as data:
                if not _holds(data, old):
                    return False
                if new is None:
                    os.unlink(self.path(name))
                else:
                    self.write_json(name, new)
            return True
        fs, path = self._filesystem(name)
        try:
            etag = fs.info(path).get("ETag")  # before the content, whose version cannot be an older one then
        except FileNotFoundError:
            return False
        if not _holds(self.read_bytes(name), old):
            return False
        if new is None:
            fs.rm_file(path)
            return True
        if etag and isinstance(fs, BucketFileSystem):
            try:
                return fs.replace(path, _json_bytes(new), etag)
            except StoreError as error:
                if error.kind != "unsupported":
                    raise
        fs.pipe_file(path, _json_bytes(new))
        return True

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BufferedRandom]:
        """A file to write that becomes visible under its name, whole, when the block ends without an exception.

        Raises UserError where the disk is full, or where the fence says that this process may write no more.
        """
        target = self.path(name)
        with self._naming_a_full_disk():
            if self.is_local:
                with whole_file(target, self._check_fence) as file:
                    yield file
                return
            with tempfile.TemporaryFile() as unnamed:  # so that a killed writer leaves nothing
                yield unnamed
                unnamed.flush()
                self._check_fence()
                fs, path = self._filesystem(name)
                fs.put_file(f"/dev/fd/{unnamed.fileno()}", path)

    def names(self, folder: str = "") -> list[str]:
        """Names of all committed objects below a folder, sorted."""
        fs, path = self._filesystem(folder)
        fs.invalidate_cache()
        start = len(path.rstrip("/")) + 1
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        try:
            below = fs.find(path)
        except FileNotFoundError:
            return []
        return sorted(prefix + name[start:] for name in below if TEMPORARY_PREFIX not in name)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly inside a folder, sorted."""
        return sorted(name for name, info in self._inside(folder) if info["type"] == "directory")

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file directly inside a folder, by name; nothing where there is none."""
        return {name: info["size"] for name, info in self._inside(folder) if info["type"] == "file"}

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
        """Remove what killed writers left in this folder: temporary files; on S3, unfinished uploads. How many.

        Only while no other writer works here. deep: and in all folders below. age: seconds that a file has been left.
        """
        self._check_fence()
        if self.is_local:
            return remove_temporaries(self.path(), deep, age)
        fs, path = self._filesystem()
        if not deep or not isinstance(fs, S3FileSystem):
            return 0
        client, prefix = fs.client(path)
        try:
            return end_uploads(client.settings, path.partition("/")[0], f"{prefix}/")
        except (OSError, SyntaxError) as error:  # refused, or answered by what is no XML
            log.info("%s: unfinished uploads cannot be looked for (%s)", self.path(), error)
            return 0

    def hashes(self, folder: str) -> dict[str, str]:
        """sha256 hex of every object below a folder, by name."""
        return {name: self.sha256(name) for name in self.names(folder)}

    def sha256(self, name: str) -> str:
        """sha256 hex of one object's bytes; FileNotFoundError when absent."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while piece := file.read(2**22):
                digest.update(piece)
        return digest.hexdigest()

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path with the content of a name for the length of the block: the file itself, or an unnamed copy.

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
        """A local copy of a folder (the folder itself on a local disk), for libraries that read only local files.

        files: names within it; where some are given, no others are fetched, nor is one of them that is not there.
        """
        if self.is_local:
            return Path(self.path(folder))
        local = CACHE / hashlib.sha256(self.path(folder).encode()).hexdigest()
        start = len(folder) + 1 if folder else 0
        for name in self.names(folder):
            if not files or name[start:] in files:
                link_file(local / name[start:], fetch_file(self.path(name), self.options))
        return local

    def _filesystem(self, name: str = "") -> tuple[Any, str]:
        return filesystem(self.path(name), self.options)

    def _inside(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        fs, path = self._filesystem(folder)
        fs.invalidate_cache()
        try:
            entries = [(info["name"].rstrip("/").rsplit("/", 1)[-1], info) for info in fs.ls(path, detail=True)]
        except FileNotFoundError:
            return []
        return [(name, info) for name, info in entries if not name.startswith(TEMPORARY_PREFIX)]

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


def fetch_url_folder(url: str, options: dict[str, Any] | None = None, *files: str) -> Path:
    """A local path with the content of the folder at a URL, or of these files of it alone, as `Store.fetch_folder`."""
    if url.startswith("package://"):
        return Path(filesystem(url, options)[1])
    return Store(url, options or {}).fetch_folder("", *files)


def _holds(data: bytes | None, value: Any) -> bool:
    """Whether bytes are those of a JSON value, or, where it is bytes itself, the same."""
    if data is None or isinstance(value, bytes):
        return data == value
    try:
        return bool(json.loads(data) == value)
    except ValueError:
        return False


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
