"""fsspec file systems over `obstore`: what s3fs, gcsfs and adlfs are to fsspec, at less than half the CPU time a byte.

In: URLs and the options that those libraries take. Out: listings, files that read ahead, objects that are put whole.
A name is `bucket/key`. Importing this module registers its classes with fsspec. (`obstore.fsspec` overwrites where it
should only create, reports a failed request as an absent object, and raises errors that are not OSErrors.)
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import fsspec
import obstore
from fsspec.spec import AbstractFileSystem

from storage.object_store.client import Client
from storage.object_store.errors import StoreError
from storage.remote_file import ObjectRanges, ReadAheadFile

_PART_BYTES = 8 * 2**20
_PARTS_AT_ONCE = 4
_MOST_PARTS = 9000  # S3 takes 10,000
_NO_VERSION = {"e_tag": f'"{"0" * 32}"', "version": "1"}  # no object is of it
_BUFFER = 2**16  # for short reads and lines


class BucketFileSystem(AbstractFileSystem):
    """The buckets of one kind of store, whose schemes are in `protocol`."""

    protocol: tuple[str, ...]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def client(self, path: str) -> tuple[Client, str]:
        """The client of a path's bucket, and the key in it."""
        bucket, _, key = self._strip_protocol(path).partition("/")
        return Client.of(self.protocol[0], bucket, self.options), key

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Size, ETag and type of an object or folder. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        if "/" in path:
            with contextlib.suppress(FileNotFoundError):
                return self._object(path)
        if not self._inside(path) and "/" in path:
            raise FileNotFoundError(self.unstrip_protocol(path))
        return _folder(path)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is such an object or folder. A request that fails raises StoreError."""
        with contextlib.suppress(FileNotFoundError):
            return bool(self.info(path))
        return False

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What is directly inside a folder, or the object itself. Raises FileNotFoundError where there is nothing."""
        path = self._strip_protocol(path)
        infos = [info for info in self._inside(path) if info["name"] != path]
        if not infos and "/" in path:  # a bucket may be empty; one that does not exist has raised
            infos = [self._object(path)]
        infos.sort(key=lambda info: info["name"])
        return infos if detail else [info["name"] for info in infos]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All objects below a folder, from the pages of one listing; with `maxdepth`, from one listing per folder."""
        path = self._strip_protocol(path)
        infos = self._below(path) if maxdepth is None else self._to_depth(path, maxdepth)
        folders = {info["name"]: info for info in infos if info["type"] == "directory"}
        # Consoles keep empty objects in the place of folders.
        found = {info["name"]: info for info in infos if info["size"] or info["name"] not in folders}
        if withdirs:
            found |= folders
        if not found and "/" in path:
            with contextlib.suppress(FileNotFoundError):
                found = {path: self._object(path)}
        found = dict(sorted(found.items()))
        return found if detail else list(found)

    def put_file(
        self,
        lpath: Any,
        rpath: str,
        callback: Any = None,
        mode: str = "overwrite",
        before_commit: Callable[[], object] = lambda: None,
        **kwargs: Any,
    ) -> None:
        """Put a local file as one object, whole or not at all; a large one in parts, a few of them in memory.

        before_commit: called before what makes the object visible is sent; an error that it raises prevents it.
        """
        with open(lpath, "rb") as file:
            self._put(rpath, file, os.fstat(file.fileno()).st_size, mode, before_commit)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Put bytes as one object. mode "create": raises FileExistsError where the object exists."""
        self._put(path, io.BytesIO(value), len(value), mode)

    def replace(self, path: str, value: bytes, version: Mapping[str, Any]) -> bool:
        """Put bytes in place of this version, as `info` gives it. False where the object has changed or is gone.

        On a store without conditional puts the bytes replace any version.
        """
        condition = _condition(version)
        try:
            self._put(path, io.BytesIO(value), len(value), condition or "overwrite")
        except (FileNotFoundError, StoreError) as error:
            if isinstance(error, StoreError) and error.kind != "changed":
                raise
            return False
        return True

    def honours_conditions(self, path: str, value: bytes) -> bool:
        """Whether puts whose conditions do not hold are refused; else `value` is put, which the object holds."""
        for condition in ("create", _NO_VERSION):
            try:
                self._put_once(path, io.BytesIO(value), len(value), condition)
            except (FileExistsError, FileNotFoundError):
                continue
            except StoreError as error:
                if error.kind not in ("changed", "refused"):
                    if error.kind == "unsupported":
                        return False
                    raise
            else:
                return False
        return True

    def rm_file(self, path: str) -> None:
        """Remove an object; nothing where there is none."""
        self._ask(path, "removed", obstore.delete)

    def rm_files(self, paths: Sequence[str]) -> None:
        """Remove objects of one bucket, with one request where the store can. Where it cannot, raises FileNotFoundError
        on one that is gone.
        """
        keys = [self._strip_protocol(path).partition("/")[2] for path in paths]
        self._ask(paths[0], "removed", lambda store, _: obstore.delete(store, keys))

    def rm(self, path: str | Iterable[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove objects, or all below folders. Raises FileNotFoundError where there is nothing."""
        for top in [path] if isinstance(path, str) else path:
            names = self.find(top) if recursive else [self._strip_protocol(top)]
            if not names:
                raise FileNotFoundError(self.unstrip_protocol(top))
            keys = [name.partition("/")[2] for name in names]
            self._ask(top, "removed", lambda store, _: obstore.delete(store, keys))  # noqa: B023

    def modified(self, path: str) -> Any:
        """When the object was last written."""
        return self.info(path)["LastModified"]

    def _open(self, path: str, mode: str = "rb", etag: str | None = None, **kwargs: Any) -> Any:
        """etag: the only version that may be read."""
        if mode != "rb":
            raise io.UnsupportedOperation("objects are put whole: put_file or pipe_file")
        return io.BufferedReader(ReadAheadFile(ObjectRanges(*self.client(path), version=etag)), _BUFFER)

    def _ask(self, path: str, doing: str, request: Callable[[Any, str], Any]) -> Any:
        client, key = self.client(path)
        return client.ask(doing, request, key)

    def _object(self, path: str) -> dict[str, Any]:
        return _file(path.partition("/")[0], self._ask(path, "read", _head))

    def _inside(self, path: str) -> list[dict[str, Any]]:
        """The objects and folders directly inside a folder, with the empty object that may stand for the folder."""
        bucket = path.partition("/")[0]
        listed = self._ask(path, "listed", lambda store, key: obstore.list_with_delimiter(store, key or None))
        folders = [_folder(f"{bucket}/{name}") for name in listed["common_prefixes"]]
        return [_file(bucket, meta) for meta in listed["objects"]] + folders

    def _below(self, path: str) -> list[dict[str, Any]]:
        """All objects below a folder, and the folders that their names imply."""
        bucket = path.partition("/")[0]
        metas = self._ask(path, "listed", lambda store, key: obstore.list(store, key or None).collect())
        infos = [_file(bucket, meta) for meta in metas]
        parts = [info["name"].split("/") for info in infos]
        top = path.count("/") + 2
        return infos + [_folder(name) for name in {"/".join(p[:n]) for p in parts for n in range(top, len(p))}]

    def _to_depth(self, path: str, depth: int) -> list[dict[str, Any]]:
        """The objects and folders down to a depth. fsspec's own walk would skip a folder whose listing fails."""
        infos: list[dict[str, Any]] = []
        level = [path]
        for _ in range(depth):
            inside = [info for folder in level for info in self._inside(folder)]
            level = [info["name"] for info in inside if info["type"] == "directory"]
            infos += inside
        return infos

    def _put(
        self, path: str, body: BinaryIO, size: int, mode: Any, before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """Put an object; on a store without conditional puts without the condition, after a look whether it exists."""
        try:
            self._put_once(path, body, size, mode, before_commit)
        except StoreError as error:
            if error.kind != "unsupported" or mode == "overwrite":
                raise
            if mode == "create" and self.exists(path):
                raise FileExistsError(self.unstrip_protocol(path)) from None
            self._put_once(path, body, size, "overwrite", before_commit)

    def _put_once(
        self, path: str, body: BinaryIO, size: int, mode: Any, before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """Put an object under the condition `mode`. Raises FileExistsError, or StoreError where it is not met."""

        def put(store: Any, key: str) -> None:
            body.seek(0)
            if size <= _PART_BYTES:
                before_commit()
                obstore.put(store, key, body, mode=mode, use_multipart=False)
                return
            part_bytes = size // min(size // _PART_BYTES, _MOST_PARTS)  # so that next to nothing is left for the last
            pieces = _pieces(body, part_bytes, before_commit)
            obstore.put(store, key, pieces, mode=mode, use_multipart=True, chunk_size=part_bytes, max_concurrency=1)

        try:
            self._ask(path, "written", put)
        except obstore.exceptions.AlreadyExistsError:
            raise FileExistsError(self.unstrip_protocol(path)) from None


def _pieces(body: BinaryIO, part_bytes: int, before_commit: Callable[[], object]) -> Iterator[bytes]:
    """The body by some parts at a time, then a call of `before_commit`, whose error aborts the upload.

    The client sends the parts of a piece at once, and takes the next piece while it does; it waits for those parts
    before it asks for the piece after that. So when `before_commit` is called all is sent but what fills no part.
    """
    while piece := body.read(_PARTS_AT_ONCE * part_bytes):
        yield piece
    yield b""  # the client waits for the parts of the last piece before it takes this
    with ThreadPoolExecutor(1) as pool:  # requests of its own cannot be made in a thread that waits for a request
        pool.submit(before_commit).result()


def _condition(info: Mapping[str, Any]) -> dict[str, str]:
    """The condition that an object is still of this version: by S3's or Azure's ETag, or by Google's generation."""
    found = {"e_tag": info.get("ETag"), "version": info.get("version")}
    return {name: value for name, value in found.items() if value}


def _file(bucket: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{bucket}/{meta['path']}",
        "size": meta["size"],
        "type": "file",
        "ETag": meta["e_tag"],
        "version": meta["version"],  # on Google's store the generation; elsewhere only of buckets that keep versions
        "LastModified": meta["last_modified"],
    }


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}


def _head(store: Any, key: str) -> Any:
    try:
        return obstore.head(store, key)
    except obstore.exceptions.BaseError as error:
        if "status code: 4" not in str(error):
            raise
        return obstore.get(store, key).meta  # the answer to a HEAD has no body, which would give the reason


class S3FileSystem(BucketFileSystem):
    """Amazon S3 and stores that speak its protocol. Options are s3fs's."""

    protocol = ("s3", "s3a")


class GCSFileSystem(BucketFileSystem):
    """Google Cloud Storage. Options are gcsfs's."""

    protocol = ("gs", "gcs")


class AzureFileSystem(BucketFileSystem):
    """Azure Blob Storage. Options are adlfs's."""

    protocol = ("az", "abfs")


for _class in (S3FileSystem, GCSFileSystem, AzureFileSystem):
    for _scheme in _class.protocol:
        fsspec.register_implementation(_scheme, _class, clobber=True)
