"""Requests to a store by many threads at once, of which most wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

THREADS = 32
"""Requests under way at once: with 25 ms each, a thousand take less than a second."""


def in_threads(work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """What a function makes of each item, in their order, by `THREADS` at a time."""
    items = list(items)
    if len(items) < 2:  # not worth a thread
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(THREADS, len(items)), "requests") as pool:
        for start in range(0, len(items), 16 * THREADS):  # no more results wait in memory than this
            yield from pool.map(work, items[start : start + 16 * THREADS])
