"""The objects that the patterns of a source find, each once, without the files of the run itself.

In: patterns as a recipe has them. Out: what was listed, in columns, with all names of a file that links give several,
and the URL that opens each. What is passed over is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.dag.plan import REBUILDS
from pipelines.recipe.data import Storage
from pipelines.report.numbers import count_of
from storage.errors import UserError
from storage.globs import expand_braces, fixed_folder, has_magic
from storage.lease import LEASE
from storage.printable import printable
from storage.public_url import object_url, public_url, unsigned_url
from storage.urls import NothingFoundError, ObjectInfo, ObjectInfos, canonical_url, is_folder, join_url, list_objects

log = logging.getLogger("ringworld")

_OF_RUNS = ("stages", "codes", REBUILDS, LEASE, "report.html", "report.json")
"""What a run writes in its root."""


@dataclass
class Found:
    """Objects in columns of one length, sorted by URL.

    urls: the name that each goes by in manifests. opens: the URLs that open them. others: further names of an object,
    by its number, where links give it several.
    """

    urls: list[str] = field(default_factory=list)
    opens: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    etags: list[str] = field(default_factory=list)
    others: dict[int, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.urls)


def find_objects(
    key: str, patterns: Sequence[str], storage: Storage, is_known: Callable[[str], bool] = lambda _: True
) -> Found:
    """What patterns find, each object once, sorted by URL.

    key: of the patterns in the recipe, for messages. is_known: of a folder's files, which are meant. Raises UserError
    where a pattern finds nothing, or only files of the run, and where two URLs cannot be told apart.
    """
    real = _RealPaths()
    listed: dict[str, tuple[ObjectInfo, str]] = {}
    for pattern in patterns:
        for info, path in _of_pattern(key, join_url(storage.data, pattern), storage, is_known, real):
            url = object_url(info.url)
            known = listed.setdefault(url, (info, path))
            if known[0].url != info.url and unsigned_url(known[0].url) != unsigned_url(info.url):
                raise UserError(
                    f"{key}: two URLs differ only in what looks like credentials ({url}), so their objects cannot be "
                    f"told apart; name them in two sources"
                )
    found, numbers = Found(), dict[str, int]()
    for url in sorted(listed):
        info, path = listed.pop(url)
        number = numbers.setdefault(path, len(found))
        if number < len(found):
            found.others.setdefault(number, []).append(url)
            continue
        found.urls.append(url)
        found.opens.append(url if info.url == url else info.url)
        found.sizes.append(info.size)
        found.etags.append(info.etag)
    if links := sum(map(len, found.others.values())):
        log.info("%s: %s of files that have other names here, each read once", key, count_of(links, "links"))
    return found


def _of_pattern(
    key: str, pattern: str, storage: Storage, is_known: Callable[[str], bool], real: _RealPaths
) -> Iterator[tuple[ObjectInfo, str]]:
    """What a pattern finds but for the files of the run, each with what links lead to."""
    below = f"{real.path(canonical_url(storage.root, storage.options))}/"
    codes = tuple(f"{real.path(canonical_url(url, storage.options))}/" for url in (storage.codes,) if url)
    passed_over = 0
    listed = _listed(key, pattern, storage, is_known)
    start = real.path(canonical_url(fixed_folder(pattern) or pattern, storage.options))
    is_inside = f"{start}/".startswith(below)
    for info, path in zip(listed, real.paths(listed), strict=True):
        is_of_run = path.startswith(below) and (not is_inside or path[len(below) :].partition("/")[0] in _OF_RUNS)
        if is_of_run or path.startswith(codes):
            passed_over += 1
        else:
            yield info, path
    where = "storage.root or storage.codes" if storage.codes else "storage.root"
    if passed_over == len(listed):
        raise UserError(
            f"{key}: {public_url(pattern)} finds only files in {public_url(storage.root)} ({where}), where this run "
            f"writes; name others, or another storage.root"
        )
    if passed_over:
        what = count_of(passed_over, "objects")
        log.info("%s: %s passed over %s in %s", key, printable(public_url(pattern)), what, where)


def _listed(key: str, pattern: str, storage: Storage, is_known: Callable[[str], bool]) -> ObjectInfos:
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
            return ObjectInfos.joined([_listed(key, part, storage, is_known) for part in parts])
    inside = list_objects(f"{pattern.rstrip('/')}/**", storage.options)
    known = inside.where(lambda url: is_known(url) and "/." not in url.removeprefix(pattern.rstrip("/")))
    shown = printable(public_url(pattern))
    if not known:
        raise UserError(
            f"{key}: no file in the folder {shown} has an extension that tells what it is; name its files by a "
            f"pattern, as {shown.rstrip('/')}/*, and set kind"
        )
    if len(known) < len(inside):
        log.info("%s: passed over %s of other kinds in %s", key, count_of(len(inside) - len(known), "files"), shown)
    return known


class _RealPaths:
    """What links lead to, of files of this machine; elsewhere the URL without credentials."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def path(self, url: str) -> str:
        """Of one file or folder."""
        if "://" in url:
            return unsigned_url(url).rstrip("/")
        return os.path.realpath(url) if os.path.islink(url) else self._in_folder(url)

    def paths(self, listed: ObjectInfos) -> Iterator[str]:
        """Of listed files."""
        for url in listed.urls:
            if "://" in url:
                yield unsigned_url(url).rstrip("/")
            else:
                yield os.path.realpath(url) if url in listed.links else self._in_folder(url)

    def _in_folder(self, path: str) -> str:
        """Of what is no link itself."""
        folder, name = os.path.split(path)
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(folder)
        return path if real == folder else os.path.join(real, name).rstrip("/")
