"""Copies of remote files in a folder of the user's own, for libraries that read only local ones.

In: a name for a version of a file, and what fetches it. Out: a local path. A copy is used again only where the folder
is nobody else's and its bytes are those that were fetched: their sha256 is kept beside them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path

from storage.errors import UserError
from storage.local_files import alone, remove_temporaries, whole_file

_ABANDONED_SECONDS = 600.0  # without a byte: a copy whose process was killed
_RECORD = ".sha256"
_HASHED: dict[Path, tuple[int, int, int]] = {}  # copies that this process has hashed: their inode, size and mtime


def cache_folder(on_local_disk: bool = False) -> Path:
    """The user's folder for copies, which nobody else may enter; made when absent.

    It is in XDG_CACHE_HOME or ~/.cache, else (on_local_disk: rather, since homes may be network disks) where temporary
    files are. Raises UserError where neither can be had.
    """
    temporary = Path(tempfile.gettempdir()) / f"ringworld-cache-{os.geteuid()}"
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    own = [base / "ringworld"] if base.is_absolute() else []  # "~" is left where there is no home
    folders = [temporary, *own] if on_local_disk else [*own, temporary]
    for folder in folders:
        if _is_made_private(folder):
            return folder
    places = " nor ".join(str(folder) for folder in folders)
    raise UserError(
        f"{places}: no folder for copies of remote files can be made there, or it is another user's; set "
        f"XDG_CACHE_HOME to a folder of your own"
    )


def cached_file(
    version: str, name: str, fetch: Callable[[BufferedRandom], object], on_local_disk: bool = False
) -> Path:
    """The copy of a version, hex, of a file that was called `name`; `fetch` writes it where there is no whole one.

    Of the processes of a node that ask at once, one fetches and the others wait for it. on_local_disk: as of
    `cache_folder`. Raises UserError where the disk is full, and what `fetch` raises.
    """
    local = cache_folder(on_local_disk) / version / _usable_name(name)
    if _is_as_fetched(local):
        return local
    local.parent.mkdir(exist_ok=True)
    with alone(local.parent):
        return local if _is_as_fetched(local) else _fetched(local, fetch)


def _fetched(local: Path, fetch: Callable[[BufferedRandom], object]) -> Path:
    remove_temporaries(local.parent, age=_ABANDONED_SECONDS)
    try:
        with whole_file(local) as file:
            fetch(file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with whole_file(_record(local)) as file:
            file.write(digest.encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{local.parent.parent}: the disk is full, or the file larger than allowed, where copies of remote "
            f"files are kept; free space or set XDG_CACHE_HOME elsewhere"
        ) from None
    _HASHED[local] = _state(local)
    return local


def _is_made_private(folder: Path) -> bool:
    """Whether the folder is there, this user's, and usable; then nobody else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if {os.lstat(folder).st_uid, folder.stat().st_uid} != {os.geteuid()}:  # a link may be another's
            return False
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _is_as_fetched(local: Path) -> bool:
    """Whether a copy is there as this user fetched it. Each process hashes a copy once."""
    try:
        state = local.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
            return False
        if _HASHED.get(local) != _state(local):
            with local.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != _record(local).read_text():
                    return False
            _HASHED[local] = _state(local)
    except (OSError, ValueError):
        return False
    return True


def _state(local: Path) -> tuple[int, int, int]:
    state = local.lstat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _record(local: Path) -> Path:
    return local.with_name(local.name + _RECORD)


def _usable_name(name: str) -> str:
    """A name of any length and kind as a file's name: libraries look at its end."""
    tail = name.rpartition("/")[2].encode()[-100:].decode(errors="ignore")
    return tail if tail not in ("", ".", "..") and not tail.startswith(".tmp-") else f"file{tail.rstrip('.')}"
