"""The output of a run: a `Store` folder on any fsspec file system, where every write is atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put, which is atomic there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.urls import CACHE, fetch_file, filesystem, open_url
from tokenization.errors import UserError

TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec file system. Names are relative, with `/`."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether names are plain files of this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, *parts: str) -> Store:
        """The store of a folder below this one."""
        return Store("/".join([self.url.rstrip("/"), *parts]), self.options)

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
            file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def create_json(self, name: str, value: Any) -> bool:
        """Commit a JSON value only if the name is free; False when it is taken (`O_EXCL`, or `If-None-Match` on S3)."""
        data = json.dumps(value, sort_keys=True).encode()
        if self.is_local:
            target = Path(self.path(name))
            with _on_disk(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
                try:
                    with os.fdopen(handle, "wb") as file:
                        file.write(data)
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                finally:
                    os.unlink(temporary)
            return True
        fs, path = filesystem(self.path(name), self.options)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno == errno.EINVAL and self.exists(name):  # how s3fs tells of S3's 412, Precondition Failed
                return False
            raise
        return True

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BufferedRandom]:
        """A file to write that becomes visible under its name, whole, when the block ends without an exception."""
        target = self.path(name)
        folder = os.path.dirname(target) if self.is_local else None
        with _on_disk(target):
            if folder:
                os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            try:
                with os.fdopen(handle, "w+b") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if self.is_local:
                    os.chmod(temporary, 0o644)
                    os.replace(temporary, target)
                else:
                    fs, path = filesystem(target, self.options)
                    fs.put_file(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

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
        fs, path = filesystem(self.path(name), self.options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)

    def sweep_temporaries(self) -> int:
        """Remove what killed writers left behind; only while no other writer works below this folder."""
        if not self.is_local:
            return 0
        left = [path for path in Path(self.path()).rglob(f"{TEMPORARY_PREFIX}*") if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

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

    def fetch_folder(self, folder: str = "") -> Path:
        """A local copy of a folder (the folder itself on a local disk), for libraries that read only local files."""
        if self.is_local:
            return Path(self.path(folder))
        local = CACHE / hashlib.sha256(self.path(folder).encode()).hexdigest()
        start = len(folder) + 1 if folder else 0
        for name in self.names(folder):
            target = local / name[start:]
            target.parent.mkdir(parents=True, exist_ok=True)
            link = target.with_name(f"{target.name}.{os.getpid()}.part")
            link.symlink_to(fetch_file(self.path(name), self.options))
            os.replace(link, target)
        return local


def fetch_url_folder(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path with the content of the folder at a URL."""
    if url.startswith("package://"):
        return Path(filesystem(url, options)[1])
    return Store(url, options or {}).fetch_folder()


@contextlib.contextmanager
def _on_disk(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: the disk is full; free space or set storage.root elsewhere") from None
        raise
