"""Which files of this machine a pattern names, with what tells their versions apart.

Links to folders are followed; a folder inside itself is not entered again. Small files are told apart by their content,
of which the hash is kept between listings, larger ones by size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator

from storage.etags import HASHED_BYTES, size_and_time
from storage.file_hashes import FileHashes, FileState, file_hashes
from storage.files import Files, Progress, merged, refuse_unnamable
from storage.globs import compiled, fixed_folder

_AT_ONCE = 10_000  # files whose states are in memory


def list_local(pattern: str, progress: Progress) -> Files:
    """The files that a pattern with globs names. Raises OSError on a folder that cannot be read."""
    match = compiled(pattern).match
    root = fixed_folder(pattern)
    depth = -1 if "**" in pattern else pattern[len(root) :].count("/")
    files = Files()
    with file_hashes() as hashes:
        for folder, entries in _walk(root, depth, (os.path.realpath(root),)):
            paths = [entry.path for entry in entries if match(entry.path)]
            refuse_unnamable(paths)
            for start in range(0, len(paths), _AT_ONCE):
                _add(files, folder, paths[start : start + _AT_ONCE], hashes)
            files.links.update(entry.path for entry in entries if entry.is_symlink())
            progress.add(len(paths))
    return merged([files])


def local_file(path: str) -> Files:
    """One file, its path taken literally; none where there is none, or where it is no file."""
    files = Files()
    if os.path.isfile(path):  # no device or pipe, which may never end
        refuse_unnamable([path])
        with file_hashes() as hashes:
            _add(files, os.path.dirname(path) + "/", [path], hashes)
    if os.path.islink(path):
        files.links.add(path)
    return files


def _walk(folder: str, depth: int, above: tuple[str, ...]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """A folder, its name ending with `/`, with its files, and those in it down to a depth; -1: all.

    above: the real paths of this folder and of those that it was reached through.
    """
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:  # there is none, or it was removed meanwhile
        return
    # No device or pipe, which may never end, nor a link to a missing file.
    yield folder, [entry for entry in listed if entry.is_file()]
    for entry in listed if depth else ():
        if entry.is_dir():
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if real not in above:
                yield from _walk(entry.path + "/", depth - 1, (*above, real))


def _add(files: Files, folder: str, paths: list[str], hashes: FileHashes) -> None:
    """Files of a folder, sorted by name."""
    states: list[tuple[str, str, os.stat_result]] = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            states.append((path, os.path.basename(path), os.stat(path)))
    small = [(name, FileState.of(state)) for _, name, state in states if state.st_size <= HASHED_BYTES]
    known = iter(hashes.known(folder, small) if small else ())
    for path, name, state in states:
        if state.st_size > HASHED_BYTES:
            files.add(path, state.st_size, size_and_time(state.st_size, state.st_mtime))
        else:
            etag = next(known)
            with contextlib.suppress(FileNotFoundError):
                files.add(path, state.st_size, etag or _hashed(folder, name, path, hashes))


def _hashed(folder: str, name: str, path: str, hashes: FileHashes) -> str:
    began = time.time_ns()
    with open(path, "rb") as file:
        before = FileState.of(os.fstat(file.fileno()))
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # of what may be more than its size says
        if before.is_settled(began) and before == FileState.of(os.fstat(file.fileno())):
            hashes.keep(folder, name, before, sha256)
    return sha256
