"""Removes what nothing needs, so that what is left after a kill in between is whole or does not look so.

A manifest says that a stage is done, so manifests go first, of all folders; then what says that a stage has begun; then
the records of partitions; and all that these named last. What is left is found and removed the next time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipelines.clean.find import Found, Unneeded
from pipelines.clean.folders import STAGES
from pipelines.clean.partition_files import RECORDS
from pipelines.dag.manifest import MANIFEST, STARTED
from pipelines.dag.records import FooterRecords
from pipelines.tokenize.codes.index import renew_index
from pipelines.tokenize.stage import TokenizeStage
from pipelines.tokenize.tokenize_task import DOCUMENTS
from storage.lease import lease
from storage.store import Store

_OLD_SECONDS = 24 * 3600.0  # a file of codes is written in minutes
_FIRST = (MANIFEST, STARTED)


@dataclass(frozen=True)
class Removed:
    """What has been removed. temporaries: half-written files that dead writers left in stores of codes."""

    files: int
    bytes: int
    temporaries: int


@contextlib.contextmanager
def leases(roots: Sequence[Store]) -> Iterator[list[Store]]:
    """Hold the lease of every run during the block, which gets the stores with their fences."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(lease(root)) for root in roots]


def remove(found: Found, roots: Sequence[Store]) -> Removed:
    """Remove what was found, of runs whose leases are held. roots: those runs, with their fences."""
    for store, names in in_order(found.unneeded):
        store.delete_many(names)
    for group in found.unneeded:
        if group.is_whole:
            group.store.delete_folder(group.folder)  # of which a disk keeps empty ones
    for root in roots:
        FooterRecords(root.at(STAGES, TokenizeStage.kind), DOCUMENTS).drop_removed()
    for encoding in found.encodings:
        renew_index(encoding)
    swept = sum(store.sweep_temporaries(age=_OLD_SECONDS) for store in found.codes if store.is_local)
    files, size = sum(len(group.sizes) for group in found.unneeded), sum(group.bytes for group in found.unneeded)
    return Removed(files, size, swept)


def in_order(unneeded: Iterable[Unneeded]) -> Iterator[tuple[Store, list[str]]]:
    """What is removed, in steps, of which each is to be done before the next is begun."""
    steps: dict[tuple[int, str], tuple[Store, list[str]]] = {}
    for group in unneeded:
        for name in group.sizes:
            _, names = steps.setdefault((_rank(group.folder, name), group.store.url), (group.store, []))
            names.append(name)
    for key in sorted(steps):
        yield steps[key]


def _rank(folder: str, name: str) -> int:
    below = name.removeprefix(f"{folder}/")
    if below in _FIRST:
        return _FIRST.index(below)
    return len(_FIRST) if folder.endswith(f"/{RECORDS}") else len(_FIRST) + 1
