"""Which objects of a bucket a pattern names, from many requests at once.

A store gives a thousand keys a request, one after the other. So a listing of more than a few pages is cut by folders,
which are listed side by side, and a large one of them is cut again. Out: the same as from one request after the other.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import obstore

from storage.files import Files, Progress
from storage.globs import compiled, fixed_folder
from storage.object_store.filesystem import BucketFileSystem

AT_ONCE = 32
"""Requests of listings of this process that stores answer at the same time."""
_REQUESTS = threading.BoundedSemaphore(AT_ONCE)
_PAGE = 1000  # keys that stores give a request
_SAMPLE_PAGES = 4  # after which a listing that has not ended may be cut by folders
_MOST_FOLDERS = 128  # of those pages: each would take a request for a few objects

Listed = tuple[Files, list[str]]
"""What one step found, and the folders that it leaves to others."""


def list_matching(fs: BucketFileSystem, pattern: str, progress: Progress) -> list[Files]:
    """The objects, named `bucket/key`, that a pattern with globs names. Raises what the requests raise."""
    folder = fixed_folder(pattern)
    start = folder.rstrip("/")
    if "**" in pattern:
        step = functools.partial(_below, fs, compiled(pattern).match, progress)
        return _side_by_side(start, step)
    parts = pattern.split("/")
    levels = [compiled("/".join(parts[:count])).match for count in range(folder.count("/") + 1, len(parts) + 1)]
    step = functools.partial(_inside, fs, levels, folder.count("/"), progress)
    return _side_by_side(start, step)


def _side_by_side(start: str, step: Callable[[str], Listed]) -> list[Files]:
    """What `step` finds in a folder and in all that it leaves to others, some of them at once."""
    found: list[Files] = []
    done: SimpleQueue[Future[Listed]] = SimpleQueue()
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="listing")
    try:
        pool.submit(step, start).add_done_callback(done.put)
        left = 1
        while left:
            files, folders = done.get().result()
            found.append(files)
            for folder in folders:
                pool.submit(step, folder).add_done_callback(done.put)
            left += len(folders) - 1
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _inside(
    fs: BucketFileSystem, levels: Sequence[Callable[[str], Any]], above: int, progress: Progress, folder: str
) -> Listed:
    """The objects directly in a folder that match, and the folders in it that may hold some.

    levels: what matches a name at each level below the fixed part of the pattern, which has `above` levels.
    """
    objects, folders = _entries(fs, folder)
    level = folder.count("/") + 1 - above if folder else 0
    progress.add(len(objects))
    files = _files(folder, objects, {folder, *folders}, levels[-1])
    return files, [one for one in folders if level + 1 < len(levels) and levels[level](one)]


def _below(fs: BucketFileSystem, match: Callable[[str], Any], progress: Progress, folder: str) -> Listed:
    """All matching objects below a folder; or those directly in it, and its folders for others to list."""
    client, key = fs.client(folder)
    bucket = folder.partition("/")[0]

    def pages(store: Any, key: str) -> Sequence[Mapping[str, Any]] | None:
        """All objects; None where they are better listed by folders."""
        stream: Any = iter(obstore.list(store, key or None, chunk_size=_PAGE))
        objects: list[Mapping[str, Any]] = list(itertools.chain.from_iterable(itertools.islice(stream, _SAMPLE_PAGES)))
        if len(objects) == _SAMPLE_PAGES * _PAGE:
            start = len(key) + 1 if key else 0
            folders = {path[start:].partition("/")[0] for one in objects if "/" in (path := one["path"])[start:]}
            if 0 < len(folders) < _MOST_FOLDERS:
                return None
        progress.add(len(objects))
        for page in stream:
            progress.add(len(page))
            objects += page
        return objects

    with _REQUESTS:
        objects = client.ask("listed", pages, key)
    if objects is None:
        objects, folders = _entries(fs, folder)
        progress.add(len(objects))
        return _files(folder, objects, {folder, *folders}, match), folders
    has_empty = any(not one["size"] for one in objects)
    folders_of = {path for one in objects for path in _above(f"{bucket}/{one['path']}")} if has_empty else set()
    return _files(folder, objects, folders_of, match), []


def _entries(fs: BucketFileSystem, folder: str) -> tuple[Sequence[Mapping[str, Any]], list[str]]:
    """The objects and the names of the folders directly inside a folder."""
    client, key = fs.client(folder)
    with _REQUESTS:
        listed: Any = client.ask("listed", lambda store, key: obstore.list_with_delimiter(store, key or None), key)
    bucket = folder.partition("/")[0]
    return listed["objects"], [f"{bucket}/{name}" for name in listed["common_prefixes"]]


def _files(folder: str, objects: Iterable[Mapping[str, Any]], folders: set[str], match: Callable[[str], Any]) -> Files:
    """The objects that match, but for empty ones in the place of folders, which consoles keep."""
    bucket, files = folder.partition("/")[0], Files()
    for one in objects:
        name, size = f"{bucket}/{one['path']}", one["size"]
        if match(name) and (size or name not in folders):
            files.add(name, size, (one["e_tag"] or "").strip('"'))
    return files


def _above(name: str) -> Iterable[str]:
    """The folders that a name is in."""
    return itertools.accumulate(name.split("/")[:-1], lambda above, part: f"{above}/{part}")
