"""What names an object of a source, and what opens it.

An object has one URL for all that a run writes, without credentials, and a key below its source: the URL below
`storage.data` where it lies there, else the whole URL. What opens it may hold credentials, and is in memory only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.recipe.data import Source, Storage
from storage.globs import expand_braces
from storage.public_url import object_url, with_user
from storage.urls import canonical_url, join_url


@dataclass(frozen=True)
class Names:
    """All that one object is called: URLs, of which links give a file several, and the key of each."""

    urls: tuple[str, ...]
    keys: tuple[str, ...]


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
