"""Listed files in columns, so that a million of them take little more than their names, and how many there are so far.

In: what each kind of file system says of its files. Out: one `Files`, sorted by name, each name once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.errors import UserError

log = logging.getLogger(f"ringworld.{__name__}")

_LOG_SECONDS = 5.0


@dataclass
class Files:
    """Names, sizes in bytes and etags of files, of one length. links: those of the names that are symbolic links."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    etags: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)

    def add(self, name: str, size: int, etag: str) -> None:
        """One file more."""
        self.names.append(name)
        self.sizes.append(size)
        self.etags.append(etag)

    def __len__(self) -> int:
        return len(self.names)


def merged(several: Iterable[Files]) -> Files:
    """All files, sorted by name; of those of one name the last."""
    whole = Files()
    for files in several:
        whole.names += files.names
        whole.sizes += files.sizes
        whole.etags += files.etags
        whole.links |= files.links
    names = whole.names
    if all(map(str.__lt__, names, names[1:])):
        return whole
    order = sorted(range(len(names)), key=names.__getitem__)
    following = [*(names[number] for number in order[1:]), None]
    order = [number for number, after in zip(order, following, strict=True) if names[number] != after]
    return Files(
        [names[number] for number in order],
        [whole.sizes[number] for number in order],
        [whole.etags[number] for number in order],
        whole.links,
    )


def refuse_unnamable(names: Iterable[str]) -> None:
    """Raise UserError where a name or URL is not UTF-8, so that no manifest can hold it."""
    names = list(names)
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        name = next(name for name in names if not _is_utf8(name))
        raise UserError(f"{name!a}: this name is not UTF-8, so no manifest can hold it; rename the file") from None


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


class Progress:
    """Logs how many objects a listing has found, every few seconds while it lasts. For many threads.

    what: is listed, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what, self._count = what, 0
        self._logged, self._lock = time.monotonic(), threading.Lock()

    def add(self, count: int) -> None:
        """So many more."""
        with self._lock:
            self._count += count
            now = time.monotonic()
            if now - self._logged < _LOG_SECONDS:
                return
            self._logged = now
            log.info("listing %s: %s objects", self._what, f"{self._count:,}")
