"""Raw objects at any fsspec URL: listed, opened, or fetched to a local path.

`package://NAME/path` is a file of an installed Python package, so that samples have the same URL on every machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.cache import cached_file
from storage.errors import UserError, is_transient
from storage.etags import HASHED_BYTES, etag_of, stated_etag
from storage.files import Files, Progress, merged, refuse_unnamable
from storage.globs import (
    any_case_extension,
    expand_braces,
    fixed_folder,
    has_magic,
    is_malformed,
    is_web,
    literal_brackets,
)
from storage.local_listing import list_local, local_file
from storage.object_store.errors import StoreError
from storage.object_store.filesystem import BucketFileSystem
from storage.object_store.listing import AT_ONCE, list_matching
from storage.packages import package_folder
from storage.public_url import public_url
from storage.reach import Reach
from storage.remote_file import FileRanges, ObjectRanges, RangedFile
from storage.retry import Backoff

RANGED = Backoff(attempts=5, pause=0.5)  # of reads by ranges: a loader waits for no more than some seconds

_CONTACT_KINDS = ("transient", "denied", "refused")  # of StoreErrors


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object: its URL, size in bytes, and a tag that changes when its content does."""

    url: str
    size: int
    etag: str


class ObjectInfos(Sequence[ObjectInfo]):
    """Listed objects in columns. urls, sizes in bytes, etags: of one length. links: URLs that are symbolic links."""

    def __init__(self, files: Files) -> None:
        self.urls, self.sizes, self.etags, self.links = files.names, files.sizes, files.etags, files.links

    @classmethod
    def joined(cls, several: Sequence[ObjectInfos]) -> ObjectInfos:
        """The objects of several listings, sorted by URL, each once."""
        return cls(merged(Files(one.urls, one.sizes, one.etags, one.links) for one in several))

    def where(self, keep: Callable[[str], bool]) -> ObjectInfos:
        """The objects whose URL is to be kept."""
        files = Files(links=self.links)
        for url, size, etag in zip(self.urls, self.sizes, self.etags, strict=True):
            if keep(url):
                files.add(url, size, etag)
        return ObjectInfos(files)

    def __iter__(self) -> Iterator[ObjectInfo]:
        return map(ObjectInfo, self.urls, self.sizes, self.etags)

    def __len__(self) -> int:
        return len(self.urls)

    @overload
    def __getitem__(self, index: int) -> ObjectInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ObjectInfo]: ...
    def __getitem__(self, index: int | slice) -> ObjectInfo | list[ObjectInfo]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return ObjectInfo(self.urls[index], self.sizes[index], self.etags[index])


class NothingFoundError(UserError):
    """There is no object at a URL or pattern."""


def join_url(base: str, relative: str) -> str:
    """`relative` below `base`, unless it is absolute or a URL of its own; with `~` and `$NAME` of the environment."""
    base, relative = _with_environment(base), _with_environment(relative)
    if not base or "://" in relative or relative.startswith("/"):
        return relative
    if has_magic(relative):  # the base is a place, no pattern
        base = re.sub(r"[*?\[]", r"[\g<0>]", base)
    return f"{base.rstrip('/')}/{relative}"


def canonical_url(url: str, options: dict[str, Any] | None = None) -> str:
    """The URL as a listing has it: a path of this machine without its scheme, a bucket by its store's first scheme."""
    with first_contact(url):
        fs, path = filesystem(url, options)
    return _url_of(fs, url, path)(path)


def filesystem(url: str, options: dict[str, Any] | None, reach: Reach | None = None) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. reach: of the records that name it; None: a recipe does.

    Raises UserError on a scheme that cannot be used, BadData on what is out of reach.
    """
    url = reach.checked(url) if reach else url
    if url.startswith("package://"):
        return fsspec.filesystem("file"), str(package_folder(url) / urlsplit(url).path.lstrip("/"))
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    if scheme in ("http", "https"):
        from storage.web import WebFileSystem  # imports aiohttp, which most processes do without

        return WebFileSystem(reach), url
    # Other processes write here too, so a listing must not be reused.
    remote = {"use_listings_cache": False, **(options or {})}
    said: Exception
    try:
        return fsspec.core.url_to_fs(url, **(remote if scheme not in ("file", "memory") else {}))
    except (ImportError, ValueError) as error:
        remedy, said = "install its fsspec package", error
    except (OSError, TypeError) as error:  # a library is missing that the package loads (Java's), or an option
        if is_transient(error):
            raise
        remedy, said = "install what it needs, or use another", error
    reason = _without_credentials(str(said).partition("\n")[0], url)
    raise UserError(f"{public_url(url)}: the scheme {scheme!r} cannot be used ({reason}); {remedy}")


def _without_credentials(text: str, url: str) -> str:
    """What an error says of a URL, in one line."""
    for one in (url, *url.split("::")):
        text = text.replace(one, public_url(one))
    return " ".join(text.split())


def open_url(url: str, options: dict[str, Any] | None = None, reach: Reach | None = None) -> BinaryIO:
    """Open a URL for reading: a seekable file that fetches ranges as they are read. reach: as of `filesystem`."""
    fs, path = filesystem(url, options, reach)
    return fs.open(path, "rb")


def open_ranged(url: str, options: dict[str, Any] | None = None, backoff: Backoff = RANGED) -> RangedFile:
    """Open a URL for reading at known offsets: each read is one request for its bytes, repeated as `backoff` says."""
    fs, path = filesystem(url, options)
    if isinstance(fs, BucketFileSystem):
        return RangedFile(ObjectRanges(*fs.client(path), backoff))
    if is_web(fs):
        from storage.web import WebRanges

        return RangedFile(WebRanges(path, backoff))
    return RangedFile(FileRanges(fs, path, url, backoff))


def open_listed(url: str, etag: str, options: dict[str, Any] | None = None) -> BinaryIO:
    """Open what a listing found, in the same version. Raises UserError where it has changed since.

    url: taken literally, as the listing has it. etag: as the listing has it. A version that is hashed is read for that.
    """
    fs, path = filesystem(url, options)
    if isinstance(fs, BucketFileSystem):
        try:
            return fs.open(path, "rb", etag=None if etag.startswith("W/") else f'"{etag}"')
        except StoreError as error:
            raise (_changed(url) if error.kind == "changed" else error) from None
    info = fs.info(path)
    if int(info.get("size") or 0) > HASHED_BYTES or stated_etag(info):
        file, found = fs.open(path, "rb"), etag_of(fs, path, info)
    else:
        file = fs.open(path, "rb")
        found = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    if found != etag:
        file.close()
        raise _changed(url)
    return file


def list_objects(pattern: str, options: dict[str, Any] | None = None) -> ObjectInfos:
    """The objects at a URL with globs and braces, sorted by URL. Raises UserError when there are none.

    A name with brackets or braces is taken literally where it exists. Of what braces stand for, each name has to exist,
    and of several patterns one has to find something. What takes long is logged as it grows.
    """
    if is_malformed(pattern):
        raise UserError(f"{public_url(pattern)}: `**` stands for folders alone; write it as a whole part: **/*.txt")
    progress = Progress(public_url(pattern))
    if not has_magic(pattern) and "{" not in pattern:
        found = _listed(pattern, options, progress)
    else:
        may_be_a_name = "[" in pattern or "{" in pattern or "://" not in pattern
        found = _listed(pattern, options, progress, literally=True) if may_be_a_name else Files()
        if not found:
            found = _of_all(expand_braces(pattern), options, progress)
        if not found and "[" in pattern:
            found = _listed(literal_brackets(pattern), options, progress)
    if not found:
        raise _absent(pattern)
    return ObjectInfos(found)


def _of_all(patterns: Sequence[str], options: dict[str, Any] | None, progress: Progress) -> Files:
    """The objects of several patterns. Raises UserError where one is a name that does not exist."""
    with first_contact(patterns[0]):
        fs, _ = filesystem(patterns[0], options)
    at_once = AT_ONCE if isinstance(fs, BucketFileSystem) else 1
    found: list[Files] = []
    with ThreadPoolExecutor(at_once, thread_name_prefix="listing") as pool:
        # As many at a time, so that an absent one ends the rest.
        for chunk in (patterns[start : start + at_once] for start in range(0, len(patterns), at_once)):
            for one, files in zip(chunk, pool.map(lambda one: _listed(one, options, progress), chunk)):
                if not files and len(patterns) > 1 and not has_magic(one):
                    raise _absent(one)
                found.append(files)
    return merged(found)


def is_folder(url: str, options: dict[str, Any] | None = None) -> bool:
    """Whether a URL, taken literally, is that of a folder; of a web server those whose URL ends with `/` are."""
    with first_contact(url):
        fs, path = filesystem(url, options)
        return url.endswith("/") if is_web(fs) else bool(fs.isdir(path))


def _changed(url: str) -> UserError:
    return UserError(
        f"{public_url(url)}: has changed since it was listed; leave sources alone during a run, and run again"
    )


def _absent(pattern: str) -> NothingFoundError:
    hint = "; the environment has no variable of that name" if "$" in pattern else ""
    return NothingFoundError(
        f"{public_url(pattern)}: no such file or object; check the URL (sources.*.urls, storage.data){hint}"
    )


def _listed(pattern: str, options: dict[str, Any] | None, progress: Progress, literally: bool = False) -> Files:
    """The objects by URL, sorted; of one name, if it is to be taken literally."""
    with first_contact(pattern):
        fs, path = filesystem(pattern, options)
        files = _found(fs, path, has_magic(path) and not literally, progress)
    files.names = list(map(_url_of(fs, pattern, path), files.names))
    refuse_unnamable(files.names)
    return files


def _found(fs: Any, path: str, has_globs: bool, progress: Progress) -> Files:
    """The files on a file system that a path with globs names, or the one at a path, if there is one."""
    if isinstance(fs, LocalFileSystem):
        path = os.path.normpath(path)
        return list_local(path, progress) if has_globs else local_file(path)
    if isinstance(fs, BucketFileSystem) and has_globs:
        try:
            files = merged(list_matching(fs, path, progress))
        except FileNotFoundError:  # no such bucket
            return Files()
        for number, etag in enumerate(files.etags):
            if not etag:
                files.etags[number] = etag_of(fs, files.names[number], {"size": files.sizes[number]})
        return files
    files, found = Files(), dict[str, dict[str, Any]]()
    with contextlib.suppress(FileNotFoundError), _web_errors():
        if has_globs and is_web(fs):
            fs.ls(fixed_folder(path), detail=False)  # a glob finds nothing where a server does not answer
        found = fs.glob(any_case_extension(path), detail=True) if has_globs else {path: fs.info(path)}
    for name, info in sorted(found.items()):
        if info.get("type") != "directory":
            files.add(name, int(info.get("size") or 0), etag_of(fs, name, info))
    return files


def _url_of(fs: Any, url: str, path: str) -> Callable[[str], str]:
    """What makes URLs of the names on a file system, where `url` is that of `path`."""
    if url.startswith("package://"):
        package = package_folder(url)
        return lambda name: f"package://{urlsplit(url).netloc}/{Path(name).relative_to(package).as_posix()}"
    if isinstance(fs, LocalFileSystem):
        return os.path.normpath
    if isinstance(fs, BucketFileSystem):
        return lambda name: f"{fs.protocol[0]}://{name}"
    place = path.lstrip("/")
    before = url.removesuffix(place) if url.endswith(place) else f"{url.partition('://')[0]}://"
    return lambda name: name if "://" in name else before + name.lstrip("/")


@contextlib.contextmanager
def _web_errors() -> Iterator[None]:
    """Raises what is behind fsspec's FileNotFoundError, which it raises whatever a web server answers, if it does."""
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or getattr(cause, "status", None) in (404, 410):
            raise
        raise cause from None


def object_info(url: str, options: dict[str, Any] | None = None, reach: Reach | None = None) -> ObjectInfo:
    """One object, its URL taken literally. reach: as of `filesystem`.

    Raises FileNotFoundError where it is absent, OSError on a failed request, BadData on what a record cannot have.
    """
    fs, path = filesystem(url, options, reach)
    try:
        info = fs.info(path)
        if info.get("type") != "file":  # a folder; a device, which may never end
            raise FileNotFoundError(url)
        return ObjectInfo(url, int(info.get("size") or 0), etag_of(fs, path, info))
    except StoreError as error:  # whose kind is of the store, not of the object, unless the name is at fault
        raise (ValueError if error.kind == "unnamable" else OSError)(str(error)) from None


def fetch_file(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path with the content of one URL: the file itself when it is local, else a copy of this version."""
    fs, path = filesystem(url, options)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise UserError(f"{public_url(url)}: no such file or object; check its name") from None
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    version = hashlib.sha256(f"{url} {etag_of(fs, path, info)}".encode()).hexdigest()
    return cached_file(version, path, lambda file: fs.get_file(path, f"/dev/fd/{file.fileno()}"))


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
        if is_explained or not ("://" in url or isinstance(error, OSError | ValueError)):  # ValueError: a NUL
            raise
        reason = _without_credentials(str(getattr(error, "reason", "") or error), url)
        raise UserError(
            f"{public_url(url)}: cannot be used ({reason}); check the path or bucket, the endpoint and the credentials"
        ) from None


def _with_environment(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
