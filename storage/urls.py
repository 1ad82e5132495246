"""Raw objects at any fsspec URL: listed, opened, or fetched to a local path.

`package://NAME/path` is a file of an installed Python package, so that samples have the same URL on every machine.
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

from storage.errors import UserError, is_transient
from storage.local_files import remove_temporaries, whole_file
from storage.object_store.errors import StoreError
from storage.object_store.filesystem import BucketFileSystem
from storage.remote_file import FileRanges, ObjectRanges, RangedFile
from storage.retry import Backoff

CACHE = Path(tempfile.gettempdir()) / "ringworld-cache"  # copies of remote files, for libraries that read local ones
RANGED = Backoff(attempts=5, pause=0.5)  # of reads by ranges: a loader waits for no more than some seconds

_ABANDONED_SECONDS = 600.0  # without a byte: a copy whose process was killed
_HASHED_BYTES = 64 * 2**20  # local files up to this size are identified by content, larger ones by size and mtime
_CONTACT_KINDS = ("transient", "denied", "refused")  # of StoreErrors
_SECRETS = re.compile("sig|token|key|cred|secret|passw|auth|access", re.IGNORECASE)


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


def public_url(url: str) -> str:
    """The URL for a manifest or a log: without a user's name, and with signatures and keys blanked."""
    scheme, separator, place = url.partition("://")
    host, slash, path = place.partition("/")
    if not separator or ("@" not in host and "?" not in path):
        return url
    path, mark, query = path.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")]
    query = "&".join(name + equals + ("..." if _SECRETS.search(name) else value) for name, equals, value in pairs)
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}{mark}{query}"


def filesystem(url: str, options: dict[str, Any] | None) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises UserError on a scheme that cannot be used."""
    if url.startswith("package://"):
        return fsspec.filesystem("file"), str(_package_folder(url) / urlsplit(url).path.lstrip("/"))
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    # Other processes write here too, so a listing must not be reused.
    remote = {"use_listings_cache": False, **(options or {})}
    try:
        return fsspec.core.url_to_fs(url, **(remote if scheme not in ("file", "memory", "http", "https") else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: the scheme {scheme!r} cannot be used ({error}); install its fsspec package") from None
    except (OSError, TypeError) as error:  # a library is missing that the package loads (Java's), or an option
        if is_transient(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{public_url(url)}: the scheme {scheme!r} cannot be used ({reason}); install what it needs, or use another"
        ) from None


def open_url(url: str, options: dict[str, Any] | None = None) -> BinaryIO:
    """Open a URL for reading: a seekable binary file that fetches ranges as they are read."""
    fs, path = filesystem(url, options)
    return fs.open(path, "rb")


def open_ranged(url: str, options: dict[str, Any] | None = None, backoff: Backoff = RANGED) -> RangedFile:
    """Open a URL for reading at known offsets: each read is one request for its bytes, repeated as `backoff` says."""
    fs, path = filesystem(url, options)
    if isinstance(fs, BucketFileSystem):
        return RangedFile(ObjectRanges(*fs.client(path), backoff))
    return RangedFile(FileRanges(fs, path, url, backoff))


def list_objects(pattern: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """The objects at a URL with globs, sorted by URL. Raises UserError when there are none."""
    fs, path = filesystem(pattern, options)
    is_local = isinstance(fs, LocalFileSystem)
    package = _package_folder(pattern) if pattern.startswith("package://") else None
    try:
        with first_contact(pattern):
            found = fs.glob(path, detail=True) if local_glob.has_magic(path) else {path: fs.info(path)}
    except FileNotFoundError:
        found = {}
    objects = []
    for name, info in sorted(found.items()):
        # Not a device or a pipe, which may never end, nor a link to a missing file.
        if not os.path.isfile(name) if is_local else info.get("type") == "directory":
            continue
        url = name
        if package:
            url = f"package://{urlsplit(pattern).netloc}/{Path(name).relative_to(package).as_posix()}"
        elif not is_local and "://" not in name:
            url = f"{pattern.partition('://')[0]}://{name.lstrip('/')}"
        objects.append(ObjectInfo(url, int(info.get("size") or 0), _etag(fs, name, info)))
    if not objects:
        raise UserError(f"{pattern}: no such file or object; check the URL (sources.*.urls, storage.data)")
    return objects


def object_info(url: str, options: dict[str, Any] | None = None) -> ObjectInfo:
    """One object, its URL taken literally. Raises FileNotFoundError where it is absent, OSError on a failed request."""
    fs, path = filesystem(url, options)
    try:
        info = fs.info(path)
        if info.get("type") != "file":  # a folder; a device, which may never end
            raise FileNotFoundError(url)
        return ObjectInfo(url, int(info.get("size") or 0), _etag(fs, path, info))
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", None)  # fsspec raises it on every answer of a web server
        if status in (408, 429) or (status or 0) >= 500:
            raise OSError(f"{public_url(url)}: the server answers {status}") from None
        raise
    except StoreError as error:  # whose kind is of the store, not of the object, unless the name is at fault
        raise (ValueError if error.kind == "unnamable" else OSError)(str(error)) from None


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


@contextlib.contextmanager
def first_contact(url: str) -> Iterator[None]:
    """Turns errors of the first request to a place into a UserError of one sentence.

    A FileNotFoundError passes: the caller knows what should have been there.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # client libraries raise errors of their own: aiohttp's are no OSErrors
        is_explained = isinstance(error, UserError) and getattr(error, "kind", "") not in _CONTACT_KINDS
        if is_explained or not ("://" in url or isinstance(error, OSError)):
            raise
        reason = " ".join(str(getattr(error, "reason", "") or error).split())
        raise UserError(
            f"{url}: cannot be used ({reason}); check the path or bucket, the endpoint and the credentials"
        ) from None


def _etag(fs: Any, path: str, info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key]).strip('"')
    size = int(info.get("size") or 0)
    if size <= _HASHED_BYTES:
        with fs.open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    return f"{size}-{info.get('mtime', info.get('created', ''))}"


def _package_folder(url: str) -> Path:
    name = urlsplit(url).netloc
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{url}: the Python package {name!r} is not installed; pip install 'ringworld[samples]'")
    return Path(next(iter(spec.submodule_search_locations)))
