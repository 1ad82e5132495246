"""The output of a run: a `Store` folder on any fsspec file system, where every write is atomic.

A write is visible whole or not at all: on a local disk through a temporary file in the same folder, `fsync` and rename;
on an object store through one put. Other file systems, where a file is seen while it is written, are only read. A store
with the fence of a lease, which tasks and workers receive with it, writes nothing once another driver has the lease,
nor completes what it was writing then.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from storage.cache import cache_folder, cached_file
from storage.errors import UserError
from storage.local_files import is_temporary, link_file, locked, remove_temporaries, whole_file
from storage.object_store.filesystem import AzureFileSystem, BucketFileSystem, GCSFileSystem, S3FileSystem
from storage.object_store.multipart_uploads import abort_uploads
from storage.public_url import public_url
from storage.urls import fetch_file, filesystem, open_ranged, open_url

log = logging.getLogger("ringworld")

_OUTPUT_SCHEMES = (*S3FileSystem.protocol, *GCSFileSystem.protocol, *AzureFileSystem.protocol, "memory")
_DELETED_AT_ONCE = 1000  # as many as S3 takes in a request
_LOCAL_SCHEMES = re.compile("(file|local)://")


@dataclass(frozen=True)
class Store:
    """A folder of any fsspec file system. Names are relative, with `/`. Methods raise UserError on an unusable URL.

    Those that write raise it also where a file system shows half-written files, or the disk is full or read-only.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    fence: Callable[[], None] | None = None  # called before every change; raises where this process may not write

    @property
    def is_local(self) -> bool:
        """Whether names are plain files of this machine."""
        return "://" not in self.url or bool(_LOCAL_SCHEMES.match(self.url))

    def at(self, *parts: str) -> Store:
        """The store of a folder below this one."""
        return replace(self, url="/".join([self.url.rstrip("/"), *parts]))

    def path(self, name: str = "") -> str:
        """The URL of a name; an absolute path on a local disk."""
        if self.is_local:
            return str(Path(_LOCAL_SCHEMES.sub("", self.url, 1)).absolute() / name)
        return f"{self.url.rstrip('/')}/{name}" if name else self.url.rstrip("/")

    def check_output(self, key: str = "storage.root") -> None:
        """Raise UserError where this cannot be written to without showing half-written files. Makes no request.

        key: of the recipe, which says where it is.
        """
        scheme, _, place = self.url.partition("://")
        if not self.is_local and not (scheme in _OUTPUT_SCHEMES and place.strip("/")):
            raise UserError(
                f"{public_url(self.url)}: this can be read at most, not be an output, where no file may be seen "
                f"half-written; set {key} to a folder of this machine or to an s3://, gs:// or az:// URL with a "
                f"bucket"
            )

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
        expected = old if isinstance(old, bytes) else _json_bytes(old)
        if self.is_local:
            self._check_fence()
            with self._explaining_disk_errors(self.path(name)), locked(Path(self.path(name))) as data:
                if data != expected:
                    return False
                if new is None:
                    os.unlink(self.path(name))
                else:
                    self.write_json(name, new)
            return True
        fs, path = self._output(name)
        self._check_fence()
        try:
            version = fs.info(path)  # read before the content, which then cannot be an older version
        except FileNotFoundError:
            return False
        if self.read_bytes(name) != expected:
            return False
        if new is None:
            fs.rm_file(path)
        elif isinstance(fs, BucketFileSystem):
            return fs.replace(path, _json_bytes(new), version)
        else:
            fs.pipe_file(path, _json_bytes(new))
        return True

    def honours_conditions(self, name: str, value: Any) -> bool:
        """Whether the store refuses to put a name, which holds `value`, under a condition that it does not meet.

        Where it does not refuse, the same value is put again.
        """
        fs, path = self._filesystem(name)
        return not isinstance(fs, BucketFileSystem) or fs.honours_conditions(path, _json_bytes(value))

    @contextlib.contextmanager
    def writing(self, name: str, exclusive: bool = False) -> Iterator[BufferedRandom]:
        """A file to write that becomes visible under its name, whole, when the block ends without an exception.

        Raises UserError where the fence forbids writing; if exclusive, FileExistsError where the name is taken.
        """
        with self._explaining_disk_errors():
            if self.is_local:
                with whole_file(self.path(name), self._check_fence, exclusive) as file:
                    yield file
                return
            fs, path = self._output(name)
            with _unnamed_file() as unnamed:
                yield unnamed
                unnamed.flush()
                file_path, mode = f"/dev/fd/{unnamed.fileno()}", "create" if exclusive else "overwrite"
                if isinstance(fs, BucketFileSystem):
                    fs.put_file(file_path, path, mode=mode, before_commit=self._check_fence)
                else:
                    self._check_fence()
                    fs.pipe_file(path, Path(file_path).read_bytes(), mode=mode)  # put_file would show half of it

    def names(self, folder: str = "") -> list[str]:
        """Names of all committed objects below a folder, sorted."""
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        return [prefix + name for name in sorted(self._listed(folder, deep=True))]

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly inside a folder, sorted."""
        return sorted(name for name, info in self._listed(folder).items() if info["type"] == "directory")

    def sizes(self, folder: str = "", deep: bool = False) -> dict[str, int]:
        """Bytes of each file directly inside a folder, by name in it; nothing where there is none. deep: also below."""
        return {name: info["size"] for name, info in self._listed(folder, deep).items() if info["type"] == "file"}

    def delete(self, name: str) -> None:
        """Remove a name if it is there."""
        fs, path = self._output(name)
        self._check_fence()
        with self._explaining_disk_errors(path), contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)

    def delete_many(self, names: Sequence[str]) -> None:
        """Remove those of many names that are there, `_DELETED_AT_ONCE` to a request where the store can."""
        fs, folder = self._output("")
        if not isinstance(fs, BucketFileSystem):
            for name in names:
                self.delete(name)
            return
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = names[start : start + _DELETED_AT_ONCE]
            self._check_fence()
            try:
                fs.rm_files([f"{folder.rstrip('/')}/{name}" for name in some])
            except FileNotFoundError:  # on a store that removes one by one: it has stopped at what was gone
                for name in some:
                    self.delete(name)

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with all that it holds, if it is there."""
        fs, path = self._output(folder)
        self._check_fence()
        with self._explaining_disk_errors(path), contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    def sweep_temporaries(self, deep: bool = True, age: float = 0.0) -> int:
        """Remove what killed writers left in this folder: temporary files; on S3, unfinished uploads. Returns how many.

        Only while no other writer works here. deep: also in all folders below. age: seconds since a file was written.
        """
        self.check_output()
        self._check_fence()
        if self.is_local:
            return remove_temporaries(self.path(), deep, age)
        fs, path = self._filesystem()
        if not deep or not isinstance(fs, S3FileSystem):
            return 0
        client, prefix = fs.client(path)
        try:
            return abort_uploads(client.settings, path.partition("/")[0], f"{prefix}/" if prefix else "")
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
        with _unnamed_file() as unnamed:
            copy = f"/dev/fd/{unnamed.fileno()}"
            with self._explaining_disk_errors():
                fs, path = self._filesystem(name)
                fs.get_file(path, copy)
            yield Path(copy)

    def node_copy(self, name: str, sha256: str) -> Path:
        """A local path to the content of a name that all processes of the node share, and one of them fetches.

        The file itself where it is local. sha256: of the content, in hex. Raises FileNotFoundError when absent, and
        UserError where what was fetched has another hash.
        """
        if self.is_local:
            return Path(self.path(name))
        fs, path = self._filesystem(name)

        def fetch(file: BufferedRandom) -> None:
            fs.get_file(path, f"/dev/fd/{file.fileno()}")
            file.seek(0)
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
                raise UserError(
                    f"{self.path(name)}: its sha256 is {found}, not {sha256} as when it was written; delete the folder "
                    f"of the stage that made it and run again"
                )

        return cached_file(sha256, name, fetch, on_local_disk=True)

    def fetch_folder(self, folder: str = "", *files: str) -> Path:
        """A local copy of a folder (the folder itself where it is local), for libraries that read only local files.

        files: names within it, which alone are fetched; none given: all. Names that are absent are ignored.
        """
        fs, path = self._filesystem(folder)
        if isinstance(fs, LocalFileSystem):
            return Path(path)
        store = self.at(folder) if folder else self
        names = [name for name in store.names() if not files or name in files]
        fetched = {name: fetch_file(store.path(name), self.options) for name in names}
        # Another version of the folder has a place of its own, so that none is a mixture.
        version = hashlib.sha256(repr((store.path(), sorted(fetched.items()))).encode()).hexdigest()
        local = cache_folder() / version
        local.mkdir(exist_ok=True)
        for name, copy in fetched.items():
            if ".." in name.split("/"):
                raise UserError(f"{store.path(name)}: no copy of a file of this name can be made; rename it")
            link_file(local / name, copy)
        return local

    def _output(self, name: str) -> tuple[Any, str]:
        """The file system and the path of a name that is to be written or removed."""
        self.check_output()
        return self._filesystem(name)

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
        return {name: info for name, info in entries.items() if not is_temporary(name)}

    def _check_fence(self) -> None:
        if self.fence:
            self.fence()

    @contextlib.contextmanager
    def _explaining_disk_errors(self, changed: str = "") -> Iterator[None]:
        """Turns errors of the disk that is written to into a UserError of one sentence.

        changed: the path that alone is changed in the block; "": the block may meet errors of other places.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, UserError) or not (reason := self._disk_error(error, changed)):
                raise
            if self.is_local:
                raise UserError(f"{self.path()}: {reason} or set storage.root elsewhere") from None
            raise UserError(
                f"{tempfile.gettempdir()}: {reason} or set TMPDIR elsewhere; files are made there before they are put "
                f"in {self.path()}"
            ) from None

    def _disk_error(self, error: OSError, changed: str) -> str:
        """What an error of the disk means, and the remedy; "" where it is another error."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full; free space"
        if error.errno == errno.EFBIG:
            return "a file is larger than the system allows; raise the limit (ulimit -f)"
        path = changed or str(error.filename or "")
        if not self.is_local or not f"{path}/".startswith(f"{self.path().rstrip('/')}/"):
            return ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{os.path.dirname(path)} cannot be written to ({error.strerror}); change its permissions"
        return "a name there is longer than the system allows; shorten it" if error.errno == errno.ENAMETOOLONG else ""


def _unnamed_file() -> Any:
    """A temporary file without a name, so that a killed writer leaves nothing."""
    try:
        return tempfile.TemporaryFile()
    except FileNotFoundError as error:  # in the words of tempfile, which name all folders that it tried
        raise UserError(
            f"no temporary file can be made ({error.strerror}); set TMPDIR to a folder with space"
        ) from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
