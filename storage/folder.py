"""A folder at any fsspec URL, as checkpoints need it: whole files in, listings with sizes, whole files out.

On a local disk a file is written beside its place and renamed into it; on an object store one put makes it visible.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import UserError

_TEMPORARY = ".tmp-"
_FULL = 1 << 20  # bytes: with less room than this a disk is full


class Folder:
    """Names are relative to the URL, with `/`. options: fsspec's for the URL. Raises UserError on an unusable URL."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        try:
            self._fs, root = fsspec.url_to_fs(url, **(options or {}))
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: this URL cannot be used ({error}); install the fsspec package it needs") from None
        self._root = root.rstrip("/")
        self.local = Path(root) if isinstance(self._fs, LocalFileSystem) else None
        """The folder itself where it is on a local disk, else None."""

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh local folder to write files in before `put`, on the folder's own disk where it has one.

        An error within, when that disk is full, becomes a UserError that says so: libraries put it in their own words.
        """
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
        path = tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.local)
        try:
            yield Path(path)
        except UserError:
            raise
        except Exception as error:
            if shutil.disk_usage(path).free < _FULL:
                raise UserError(f"{Path(path).parent}: the disk is full; free space or write elsewhere") from error
            raise
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def put(self, path: Path, name: str) -> None:
        """Publish a file of a `workspace` under `name`, whole; the local file may be gone afterwards."""
        if self.local is None:
            self._fs.put_file(str(path), self._path(name))
            return
        with path.open("rb") as file:
            os.fsync(file.fileno())
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Publish a file of these bytes-like pieces, whole. Raises UserError where the disk is full."""
        try:
            if self.local is not None:
                self._write_beside(self.local, name, pieces)
                return
            with tempfile.TemporaryFile() as unnamed:  # so that a killed writer leaves nothing
                unnamed.writelines(pieces)
                unnamed.flush()
                self._fs.put_file(f"/dev/fd/{unnamed.fileno()}", self._path(name))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = self.local or tempfile.gettempdir()
            raise UserError(f"{place}: the disk is full; free space or write elsewhere") from error

    @staticmethod
    def _write_beside(local: Path, name: str, pieces: Iterable[Any]) -> None:
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=local)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A local path with the content of `name`: the file itself, or a copy that nothing outlives.

        Raises FileNotFoundError when absent.
        """
        if self.local is not None:
            yield self.local / name
            return
        with tempfile.TemporaryFile() as unnamed:
            path = f"/dev/fd/{unnamed.fileno()}"
            self._fs.get_file(self._path(name), path)
            yield Path(path)

    def open(self, name: str) -> Any:
        """A binary file to read. Raises FileNotFoundError when absent."""
        return self._fs.open(self._path(name), "rb")

    def folders(self) -> list[str]:
        """Names of the folders directly inside."""
        return [path.rsplit("/", 1)[1] for path, info in self._list("") if info["type"] == "directory"]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file directly inside `folder`; nothing where there is none."""
        return {path.rsplit("/", 1)[1]: info["size"] for path, info in self._list(folder) if info["type"] == "file"}

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all it holds, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def sweep(self) -> None:
        """Remove the workspaces and files that killed writers left; only while no other writer works here."""
        if self.local is not None:
            for path in self.local.glob(f"{_TEMPORARY}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _list(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        return [(info["name"].rstrip("/"), info) for info in found]
