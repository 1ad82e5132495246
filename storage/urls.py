"""Raw objects behind one door: any fsspec URL, listed, opened, or fetched to a local path.

`package://NAME/path` is a file of an installed Python package, so that samples have one URL on every machine.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage import object_store
from storage.errors import UserError
from storage.local_files import remove_temporaries, whole_file
from storage.object_store.errors import StoreError
from storage.object_store.filesystem import BucketFileSystem
from storage.remote_file import FileRanges, RangedFile
from storage.retry import Backoff

CACHE = Path(tempfile.gettempdir()) / "ringworld-cache"
"""Where libraries that read only local files find copies of remote ones."""

RANGED = Backoff(attempts=5, pause=0.5)
"""Of reads by ranges: a loader behind them waits for no more than some seconds."""

_ABANDONED_SECONDS = 600.0  # without a byte: a copy whose process was killed
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
    fs, path = filesystem(url, options)
    return fs.open(path, "rb")


def open_ranged(url: str, options: dict[str, Any] | None = None, backoff: Backoff = RANGED) -> RangedFile:
    """Open a URL for reading at known offsets: each read is one request for exactly its bytes.

    backoff: of requests in a row that bring nothing.
    """
    fs, path = filesystem(url, options)
    return RangedFile(
        fs.ranges(path, backoff) if isinstance(fs, BucketFileSystem) else FileRanges(fs, path, url, backoff)
    )


def list_objects(pattern: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """The objects that a URL with globs names, sorted by URL. Raises UserError when there are none."""
    fs, path = filesystem(pattern, options)
    prefix = pattern[: len(pattern) - len(_tail(pattern))] if "://" in pattern else ""
    base = _package_folder(pattern) if pattern.startswith("package://") else None
    try:
        with first_contact(pattern):
            found = fs.glob(path, detail=True) if local_glob.has_magic(path) else {path: fs.info(path)}
    except FileNotFoundError:
        found = {}
    objects = []
    for name, info in sorted(found.items()):
        if info.get("type") == "directory":
            continue
        if isinstance(fs, LocalFileSystem) and not os.path.isfile(name):
            continue  # a device or a pipe, which may never end, or a link to nowhere
        if base is not None:
            url = f"package://{_package_name(pattern)}/{Path(name).relative_to(base).as_posix()}"
        else:
            url = name if isinstance(fs, LocalFileSystem) or "://" in name else prefix + name.lstrip("/")
        objects.append(ObjectInfo(url, int(info.get("size") or 0), _etag(fs, name, info)))
    if not objects:
        raise UserError(f"{pattern}: no such file or object; check the URL (sources.*.urls, storage.data)")
    return objects


_SECRETS = re.compile("sig|token|key|cred|secret|passw|auth|access", re.IGNORECASE)


def public_url(url: str) -> str:
    """The URL as it may stand in a manifest or a log: without a user's name, and with signatures and keys blanked."""
    scheme, separator, place = url.partition("://")
    host, slash, path = place.partition("/")
    if not separator or ("@" not in host and "?" not in path):
        return url
    path, mark, query = path.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")]
    query = "&".join(name + equals + ("..." if _SECRETS.search(name) else value) for name, equals, value in pairs)
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}{mark}{query}"


def object_info(url: str, options: dict[str, Any] | None = None) -> ObjectInfo:
    """One object, its URL taken literally. FileNotFoundError when it is not there, OSError when that is unknown."""
    fs, path = filesystem(url, options)
    try:
        info = fs.info(path)
        if info.get("type") != "file":  # a folder; a device, which may never end
            raise FileNotFoundError(url)
        return ObjectInfo(url, int(info.get("size") or 0), _etag(fs, path, info))
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", None)  # fsspec says the same of every answer of a web server
        if status in (408, 429) or (status or 0) >= 500:
            raise OSError(f"{public_url(url)}: the server answers {status}") from None
        raise
    except StoreError as error:  # which says nothing of the object, unless its name is none
        raise (ValueError if error.kind == "unnamable" else OSError)(str(error)) from None


@contextlib.contextmanager
def first_contact(url: str) -> Iterator[None]:
    """First contact with a place: whatever keeps it from answering is the user's to mend, told in one sentence.

    A FileNotFoundError passes through: the caller knows what should have been there.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # client libraries raise what they like: aiohttp's are no OSErrors
        at_first = isinstance(error, StoreError) and error.kind in ("transient", "denied", "refused")
        if isinstance(error, UserError) and not at_first:
            raise
        if "://" not in url and not isinstance(error, OSError):
            raise
        reason = " ".join(str(getattr(error, "reason", "") or error).split())
        raise UserError(
            f"{url}: cannot be used ({reason}); check the path or bucket, the endpoint and the credentials"
        ) from None


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


def filesystem(url: str, options: dict[str, Any] | None) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises UserError on a scheme that cannot be used."""
    if url.startswith("package://"):
        return fsspec.filesystem("file"), str(_package_folder(url) / urlsplit(url).path.lstrip("/"))
    object_store.register()
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    # Other processes write where this one has listed: what was listed once must not stand for what is there now.
    remote = {"use_listings_cache": False, **(options or {})}
    try:
        return fsspec.core.url_to_fs(url, **(remote if scheme not in ("file", "memory", "http", "https") else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: the scheme {scheme!r} cannot be used ({error}); install its fsspec package") from None


def fetch_file(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path with the content of one URL: the file itself when it is local, else a copy of this version."""
    fs, path = filesystem(url, options)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file or object; check it in the recipe") from None
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    version = hashlib.sha256(f"{url} {_etag(fs, path, info)}".encode()).hexdigest()
    local = CACHE / version / Path(path).name
    if not local.exists():
        remove_temporaries(local.parent, age=_ABANDONED_SECONDS)
        with whole_file(local) as file:
            fs.get_file(path, f"/dev/fd/{file.fileno()}")
    return local
