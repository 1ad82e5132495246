"""The output of a run: a `Store` folder on any fsspec file system, where every write is atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put, which is atomic there. A store that a lease fences writes nothing once the lease is
another's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import UserError
from storage.object_store.errors import StoreError
from storage.object_store.filesystem import BucketFileSystem, S3FileSystem
from storage.object_store.multipart_uploads import end_uploads
from storage.urls import CACHE, fetch_file, filesystem, open_url

log = logging.getLogger("ringworld")

TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec file system. Names are relative, with `/`.

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

    def exists(self, name: str) -> bool:
        """Whether the name holds a committed object."""
        fs, path = filesystem(self.path(name), self.options)
        return bool(fs.exists(path))

    def read_json(self, name: str) -> Any | None:
        """The JSON of a name, or None when it is absent."""
        try:
            with self.open(name) as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None

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
            target = self.path(name)
            with self._on_disk(), _temporary(target) as (file, temporary):
                file.write(data)
                file.flush()
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
            return True
        fs, path = filesystem(self.path(name), self.options)
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

        One of several at once is told True on a local disk, and on a store with `If-Match`, but for removing there.
        """
        self._check_fence()
        if self.is_local:
            with _locked(Path(self.path(name))) as held:
                if held != old:
                    return False
                if new is None:
                    os.unlink(self.path(name))
                else:
                    self.write_json(name, new)
            return True
        fs, path = filesystem(self.path(name), self.options)
        try:
            etag = fs.info(path).get("ETag")  # before the content, whose version cannot be an older one then
        except FileNotFoundError:
            return False
        if self.read_json(name) != old:
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
        """A file to write that becomes visible under its name, whole, when the block ends without an exception."""
        target = self.path(name)
        with self._on_disk():
            if self.is_local:
                with _temporary(target) as (file, temporary):
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(temporary, 0o644)
                    self._check_fence()
                    os.replace(temporary, target)
                return
            with tempfile.TemporaryFile() as unnamed:  # so that a killed writer leaves nothing
                yield unnamed
                unnamed.flush()
                self._check_fence()
                fs, path = filesystem(target, self.options)
                fs.put_file(f"/dev/fd/{unnamed.fileno()}", path)

    def names(self, folder: str = "") -> list[str]:
        """Names of all committed objects below a folder, sorted."""
        base = self.path(folder)
        fs, path = filesystem(base, self.options)
        fs.invalidate_cache()
        start = len(path.rstrip("/")) + 1
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        try:
            found = fs.find(path)
        except FileNotFoundError:
            return []
        return sorted(prefix + name[start:] for name in found if TEMPORARY_PREFIX not in name)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        start = len(folder.rstrip("/")) + 1 if folder else 0
        return sorted({name[start:].split("/", 1)[0] for name in self.names(folder) if "/" in name[start:]})

    def delete(self, name: str) -> None:
        """Remove a name if it is there."""
        self._check_fence()
        fs, path = filesystem(self.path(name), self.options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)

    def sweep_temporaries(self, deep: bool = True, age: float = 0.0) -> int:
        """Remove what killed writers left in this folder: temporary files; on S3, unfinished uploads. How many.

        Only while no other writer works here. deep: and in all folders below. age: seconds that a file has been left.
        """
        if self.is_local:
            folder = Path(self.path())
            left = list((folder.rglob if deep else folder.glob)(f"{TEMPORARY_PREFIX}*"))
            return sum(_remove_if_older(path, age) for path in left)
        fs, path = filesystem(self.path(), self.options)
        if not deep or not isinstance(fs, S3FileSystem):
            return 0
        client, prefix = fs.client(path)
        try:
            return end_uploads(client.settings, path.partition("/")[0], f"{prefix}/")
        except (OSError, SyntaxError) as error:  # refused, or answered by what is no XML
            log.info("%s: unfinished uploads cannot be looked for (%s)", self.path(), error)
            return 0

    def _check_fence(self) -> None:
        if self.fence:
            self.fence()

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
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

    def fetch_folder(self, folder: str = "", *files: str) -> Path:
        """A local copy of a folder (the folder itself on a local disk), for libraries that read only local files.

        files: names within it; where some are given, no others are fetched, nor is one of them that is not there.
        """
        if self.is_local:
            return Path(self.path(folder))
        local = CACHE / hashlib.sha256(self.path(folder).encode()).hexdigest()
        start = len(folder) + 1 if folder else 0
        for name in self.names(folder):
            if files and name[start:] not in files:
                continue
            target = local / name[start:]
            target.parent.mkdir(parents=True, exist_ok=True)
            link = target.with_name(f"{target.name}.{os.getpid()}.part")
            link.symlink_to(fetch_file(self.path(name), self.options))
            os.replace(link, target)
        return local


def fetch_url_folder(url: str, options: dict[str, Any] | None = None, *files: str) -> Path:
    """A local path with the content of the folder at a URL, or of these files of it alone, as `Store.fetch_folder`."""
    if url.startswith("package://"):
        return Path(filesystem(url, options)[1])
    return Store(url, options or {}).fetch_folder("", *files)


def _remove_if_older(path: Path, age: float) -> bool:
    try:
        if time.time() - path.stat().st_mtime < age:
            return False
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    return True


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@contextlib.contextmanager
def _temporary(target: str) -> Iterator[tuple[BufferedRandom, str]]:
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """What a JSON file holds (None: it is not there), while no other process that locks it replaces it."""
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
                current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield json.loads(file.read())
                return
