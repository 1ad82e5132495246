"""The objects that the patterns of a source find, each once, without the files of the run itself.

In: patterns as a recipe has them. Out: what was listed, with all names of a file that links give several, and the URL
that opens each. What is passed over is logged.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.dag.plan import REBUILDS
from pipelines.recipe.data import Storage
from pipelines.report.numbers import count_of
from storage.errors import UserError
from storage.globs import expand_braces, fixed_folder, has_magic
from storage.lease import LEASE
from storage.printable import printable
from storage.public_url import object_url, public_url, unsigned_url
from storage.urls import NothingFoundError, ObjectInfo, canonical_url, is_folder, join_url, list_objects

log = logging.getLogger("ringworld")

_OF_RUNS = ("stages", "codes", REBUILDS, LEASE, "report.html", "report.json")
"""What a run writes in its root."""


@dataclass(frozen=True)
class Found:
    """One object. info: with the URL that opens it. urls: its names for manifests, the one that it goes by first."""

    info: ObjectInfo
    urls: tuple[str, ...]


def find_objects(
    key: str, patterns: Sequence[str], storage: Storage, is_known: Callable[[str], bool] = lambda _: True
) -> list[Found]:
    """What patterns find, each object once, sorted by URL.

    key: of the patterns in the recipe, for messages. is_known: of a folder's files, which are meant. Raises UserError
    where a pattern finds nothing, or only files of the run, and where two URLs cannot be told apart.
    """
    _real_folder.cache_clear()
    listed: dict[str, tuple[str, ObjectInfo]] = {}
    for pattern in patterns:
        for info in _of_pattern(key, join_url(storage.data, pattern), storage, is_known):
            url = object_url(info.url)
            if url in listed and unsigned_url(listed[url][1].url) != unsigned_url(info.url):
                raise UserError(
                    f"{key}: two URLs differ only in what looks like credentials ({url}), so their objects cannot be "
                    f"told apart; name them in two sources"
                )
            listed.setdefault(url, (_real(info.url), info))
    names: dict[str, list[str]] = {}
    for url in sorted(listed):
        names.setdefault(listed[url][0], []).append(url)
    if links := len(listed) - len(names):
        log.info("%s: %s of files that have other names here, each read once", key, count_of(links, "links"))
    return [Found(listed[urls[0]][1], tuple(urls)) for urls in names.values()]


def _of_pattern(key: str, pattern: str, storage: Storage, is_known: Callable[[str], bool]) -> Iterator[ObjectInfo]:
    root = _real(canonical_url(storage.root, storage.options))
    passed_over = 0
    listed = _listed(key, pattern, storage, is_known)
    is_inside = f"{_real(canonical_url(fixed_folder(pattern) or pattern, storage.options))}/".startswith(f"{root}/")
    for info in listed:
        outside, is_below, name = _real(info.url).partition(f"{root}/")
        if is_below and not outside and (not is_inside or name.partition("/")[0] in _OF_RUNS):
            passed_over += 1
        else:
            yield info
    if passed_over == len(listed):
        raise UserError(
            f"{key}: {public_url(pattern)} finds only files in {public_url(storage.root)} (storage.root), where this "
            f"run writes; name others, or another storage.root"
        )
    if passed_over:
        what = count_of(passed_over, "objects")
        log.info("%s: %s passed over %s in storage.root", key, printable(public_url(pattern)), what)


def _listed(key: str, pattern: str, storage: Storage, is_known: Callable[[str], bool]) -> list[ObjectInfo]:
    """What a pattern finds; of a folder all that is in it and known, but for hidden files."""
    is_page = pattern.startswith(("http://", "https://")) and pattern.endswith("/")  # a web server's list of a folder
    try:
        if not is_page:
            return list_objects(pattern, storage.options)
    except NothingFoundError:
        parts = expand_braces(pattern)
        if has_magic(pattern) or not (len(parts) > 1 or is_folder(pattern, storage.options)):
            raise
        if len(parts) > 1:
            return [info for part in parts for info in _listed(key, part, storage, is_known)]
    inside = list_objects(f"{pattern.rstrip('/')}/**", storage.options)
    known = [info for info in inside if is_known(info.url) and "/." not in info.url.removeprefix(pattern.rstrip("/"))]
    shown = printable(public_url(pattern))
    if not known:
        raise UserError(
            f"{key}: no file in the folder {shown} has an extension that tells what it is; name its files by a "
            f"pattern, as {shown.rstrip('/')}/*, and set kind"
        )
    if len(known) < len(inside):
        log.info("%s: passed over %s of other kinds in %s", key, count_of(len(inside) - len(known), "files"), shown)
    return known


def _real(url: str) -> str:
    """What links lead to, of a file of this machine; the URL without credentials elsewhere."""
    if "://" in url:
        return unsigned_url(url).rstrip("/")
    folder, name = os.path.split(url)
    return os.path.realpath(url) if os.path.islink(url) else os.path.join(_real_folder(folder), name).rstrip("/")


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
