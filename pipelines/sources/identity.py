"""What names an object of a source, and what opens it.

An object has one URL for all that a run writes, without credentials, and a key below its source: the URL below
`storage.data` where it lies there, else the whole URL. What opens it may hold credentials, and is in memory only.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.recipe.data import Source, Storage
from storage.globs import expand_braces
from storage.public_url import object_url, with_user
from storage.urls import canonical_url, join_url

_AFTER_SLASH = chr(ord("/") + 1)


class Names:
    """All that objects are called: their URLs, of which links give a file several, and the key of each.

    Sorted, so that a name or the names in a folder are found without going over all of them.
    """

    def __init__(self, names: Sequence[str], numbers: Any) -> None:
        """names: of objects, in any order. numbers: of the object that each is of."""
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[place] for place in order]
        self.numbers = np.asarray(numbers, np.int64)[order]

    @property
    def objects(self) -> int:
        """How many objects have these names."""
        return len(np.unique(self.numbers))

    def called(self, name: str) -> np.ndarray:
        """The numbers of the objects of exactly this name, and of those in a folder of it."""
        folder = f"{name.rstrip('/')}/"
        own = slice(bisect_left(self.names, name), bisect_right(self.names, name))
        inside = slice(bisect_left(self.names, folder), bisect_left(self.names, folder[:-1] + _AFTER_SLASH))
        return np.concatenate([self.numbers[own], self.numbers[inside]])

    @functools.cached_property
    def column(self) -> pa.Array:
        """The names as a column, which is searched many names at a time."""
        return pa.array(self.names, pa.large_string())

    def where(self, mask: np.ndarray) -> Names:
        """The names at which a boolean mask holds."""
        return Names([self.names[place] for place in np.flatnonzero(mask)], self.numbers[mask])


def data_url(storage: Storage) -> str:
    """`storage.data` as listings have it, without credentials; empty where there is none."""
    data = join_url("", storage.data)
    return object_url(canonical_url(data, storage.options)).rstrip("/") if data else ""


def below(data: str, url: str) -> str:
    """An object's URL below `data` where it lies there, else the whole URL."""
    return url.removeprefix(f"{data}/") if data else url


def opening_urls(storage: Storage, source: Source) -> Callable[[str], str] | None:
    """From an object's URL in a manifest to the URL that opens it: the source's own, or with the user that it names.

    None where each object is opened by its own URL.
    """
    given = [url for pattern in source.urls for url in expand_braces(join_url(storage.data, pattern))]
    signed = {object_url(url): url for url in reversed(given) if object_url(url) != url}
    if not signed:
        return None
    places = {url[: url.find("/", url.find("://") + 3) + 1] or url: url for url in reversed(signed.values())}

    def opening(url: str) -> str:
        if url in signed:
            return signed[url]
        return next((opened for one in places.values() if (opened := with_user(url, one)) != url), url)

    return opening
