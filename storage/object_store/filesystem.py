"""fsspec file systems over `obstore`: what s3fs, gcsfs and adlfs are to fsspec, at less than half the CPU a byte.

In: URLs and the options that those libraries take. Out: listings, files that read ahead, whole objects put at once.
A name is `bucket/key`. (`obstore.fsspec` exists: it overwrites where it was asked to create, calls an unanswered
question "absent", and raises errors that are no OSErrors.)
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, TypeVar

import obstore
from fsspec.spec import AbstractFileSystem

from storage.object_store.client import Client
from storage.object_store.errors import StoreError
from storage.object_store.ranges import ObjectRanges
from storage.remote_file import ReadAheadFile
from storage.retry import Backoff

_PART_BYTES = 8 * 2**20
_PARTS_AT_ONCE = 4
_MOST_PARTS = 9000  # S3 takes 10,000

T = TypeVar("T")


class BucketFileSystem(AbstractFileSystem):
    """The buckets of one scheme. Its options are those of the fsspec library that is known for the scheme."""

    scheme = ""
    sep = "/"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def client(self, path: str) -> tuple[Client, str]:
        """The client of a path's bucket, and the key in it."""
        bucket, _, key = self._strip_protocol(path).partition("/")
        return Client.of(self.scheme, bucket, self.options), key

    def url(self, path: str) -> str:
        """With its scheme."""
        return f"{self.scheme}://{self._strip_protocol(path)}"

    def ask(self, path: str, doing: str, request: Callable[[Any, str], T]) -> T:
        """`request(store, key)`, repeated while its errors pass. doing: read, written, listed, removed.

        Raises FileNotFoundError where there is no such object or bucket, else StoreError; AlreadyExistsError passes.
        """
        client, key = self.client(path)
        return client.ask(client.context(self.url(path), doing), request, key)

    def ranges(self, path: str, backoff: Backoff | None = None) -> ObjectRanges:
        """The object's bytes, for `RangedFile` and `ReadAheadFile`."""
        client, key = self.client(path)
        return ObjectRanges(client, key, self.url(path), backoff)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Size, ETag and type of an object or folder. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        if "/" in path:
            try:
                return self._file(path.partition("/")[0], self.ask(path, "read", _head))
            except FileNotFoundError:
                pass
        inside = self.ask(path, "listed", _inside)
        if "/" in path and not (inside["objects"] or inside["common_prefixes"]):
            raise FileNotFoundError(self.url(path))
        return {"name": path, "size": 0, "type": "directory"}

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether it is there; an unanswered question is an error, not a no."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What is directly inside a folder, or the object itself. Raises FileNotFoundError where there is nothing."""
        path = self._strip_protocol(path)
        bucket, _, key = path.partition("/")
        found = self.ask(path, "listed", _inside)
        listed = [self._file(bucket, meta) for meta in found["objects"] if meta["path"] != key]
        listed += [{"name": f"{bucket}/{name}", "size": 0, "type": "directory"} for name in found["common_prefixes"]]
        if not listed:
            if not key:
                return []  # an empty bucket; one that is not there has raised
            listed = [self._file(bucket, self.ask(path, "read", _head))]
        listed.sort(key=lambda info: info["name"])
        return listed if detail else [info["name"] for info in listed]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All objects below a folder, by pages of one listing; to a depth, folder by folder."""
        path = self._strip_protocol(path)
        bucket = path.partition("/")[0]
        if maxdepth is None:
            metas = self.ask(path, "listed", lambda store, key: obstore.list(store, key or None).collect())
            folders = {name for meta in metas for name in _parents(f"{bucket}/{meta['path']}", path)}
        else:
            metas, folders = self._to_depth(path, maxdepth)
        below = [self._file(bucket, meta) for meta in metas]
        # Consoles keep empty objects in the place of folders.
        found = {info["name"]: info for info in below if info["size"] or info["name"] not in folders}
        if withdirs:
            found |= {name: {"name": name, "size": 0, "type": "directory"} for name in folders}
        if not found and "/" in path:
            try:
                found = {path: self._file(bucket, self.ask(path, "read", _head))}
            except FileNotFoundError:
                found = {}
        found = dict(sorted(found.items()))
        return found if detail else list(found)

    def _to_depth(self, path: str, depth: int) -> tuple[list[Any], set[str]]:
        """What is at most so many folders deep, and the folders; fsspec's own walk would pass over errors."""
        bucket = path.partition("/")[0]
        metas: list[Any] = []
        folders: set[str] = set()
        level = [path]
        for _ in range(depth):
            listed = [self.ask(folder, "listed", _inside) for folder in level]
            metas += [meta for inside in listed for meta in inside["objects"]]
            level = [f"{bucket}/{name}" for inside in listed for name in inside["common_prefixes"]]
            folders.update(level)
        return metas, folders

    def walk(self, path: str, maxdepth: int | None = None, on_error: Any = "raise", **kwargs: Any) -> Any:
        """As fsspec's, but an error is raised unless told otherwise."""
        return super().walk(path, maxdepth=maxdepth, on_error=on_error, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes of an object, or those from `start` to `end`."""
        with self._open(path) as file:
            file.seek(start or 0, os.SEEK_SET if (start or 0) >= 0 else os.SEEK_END)
            return file.read(-1 if end is None else (end if end >= 0 else self.size(path) + end) - file.tell())

    def put_file(self, lpath: Any, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put a local file as one object, whole or not at all; a large one by parts, few of them in memory."""
        with open(lpath, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._put(rpath, file, size, mode)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put bytes as one object. mode "create": FileExistsError where there is one."""
        self._put(path, value, len(value), mode)

    def replace(self, path: str, value: bytes, etag: str) -> bool:
        """Put bytes in place of the version with this ETag; False where there is another by now, or none."""
        try:
            self.ask(
                path, "written", lambda store, key: obstore.put(store, key, value, mode={"e_tag": etag}, **_IN_ONE)
            )
        except FileNotFoundError:
            return False
        except StoreError as error:
            if error.kind == "changed":
                return False
            raise
        return True

    def _put(self, path: str, body: BinaryIO | bytes, size: int, mode: Any) -> None:
        parts: dict[str, Any] = {"chunk_size": max(_PART_BYTES, -(-size // _MOST_PARTS)), **_PARTS}
        if size <= _PART_BYTES:
            parts = _IN_ONE

        def put(store: Any, key: str) -> None:
            if not isinstance(body, bytes):
                body.seek(0)
            obstore.put(store, key, body, mode=mode, **parts)

        try:
            self.ask(path, "written", put)
        except obstore.exceptions.AlreadyExistsError:
            raise FileExistsError(self.url(path)) from None

    def rm_file(self, path: str) -> None:
        """Remove an object; nothing where there is none."""
        self.ask(path, "removed", obstore.delete)

    def rm(self, path: str | Iterable[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove objects, or all below folders. Raises FileNotFoundError where there is nothing."""
        for one in [path] if isinstance(path, str) else path:
            names = self.find(one) if recursive else [self._strip_protocol(one)]
            if not names:
                raise FileNotFoundError(self.url(one))
            keys = [name.partition("/")[2] for name in names]
            self.ask(one, "removed", lambda store, _: obstore.delete(store, keys))  # noqa: B023

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy an object by way of this machine."""
        self.pipe_file(path2, self.cat_file(path1))

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing: folders are but parts of names."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing, as ever."""

    def created(self, path: str) -> Any:
        """When it was last written."""
        return self.info(path)["LastModified"]

    modified = created

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise io.UnsupportedOperation("objects are put whole: put_file or pipe_file")
        return ReadAheadFile.opened(self.ranges(path))

    @staticmethod
    def _file(bucket: str, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": f"{bucket}/{meta['path']}",
            "size": meta["size"],
            "type": "file",
            "ETag": meta["e_tag"],
            "LastModified": meta["last_modified"],
        }


_IN_ONE: dict[str, Any] = {"use_multipart": False}
_PARTS: dict[str, Any] = {"use_multipart": True, "max_concurrency": _PARTS_AT_ONCE}


def _head(store: Any, key: str) -> Any:
    try:
        return obstore.head(store, key)
    except obstore.exceptions.BaseError as error:
        if "status code: 4" not in str(error):
            raise
        return obstore.get(store, key).meta  # the answer to a HEAD has no body, which would say why


def _inside(store: Any, key: str) -> Any:
    return obstore.list_with_delimiter(store, key or None)


def _parents(name: str, top: str) -> Iterable[str]:
    """The folders of a name below `top`."""
    parts = name.split("/")[:-1]
    return ("/".join(parts[:length]) for length in range(top.count("/") + 2, len(parts) + 1))


class S3FileSystem(BucketFileSystem):
    """Options are s3fs's."""

    protocol = ("s3", "s3a")
    scheme = "s3"


class GCSFileSystem(BucketFileSystem):
    """Options are gcsfs's."""

    protocol = ("gs", "gcs")
    scheme = "gs"


class AzureFileSystem(BucketFileSystem):
    """Options are adlfs's."""

    protocol = ("az", "abfs")
    scheme = "az"
