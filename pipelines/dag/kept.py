"""Stages that keep the data that they began with, although the sources have changed since.

A training that has begun does not begin anew because a file was put in the bucket: it goes on with what it was packed,
and new documents reach the next training stage or the next run. So it is with all that only such a stage reads. Where
the recipe changes, or a version of Ringworld makes other output, nothing is kept.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.dag.manifest import MANIFEST, STARTED, Declaration, digest, is_fingerprint
from pipelines.dag.stage import Stage
from storage.store import Store

REQUEST = "request"
"""In `STARTED`: the request that the folder answers."""


@dataclass(frozen=True)
class Kept:
    """A folder that a stage keeps, and how it was declared."""

    folder: str
    declaration: Declaration
    began: str


def requests(stages: Sequence[Stage[Any]], rebuilds: Mapping[str, int]) -> dict[str, str]:
    """What is asked of each stage, as a hash: all that determines its output, but for what the sources hold."""
    asked: dict[str, str] = {}
    for stage in stages:
        of_inputs = {name: asked[name] for name in stage.inputs}
        versions = [stage.output_version, rebuilds.get(stage.name, 0)]
        asked[stage.name] = digest([stage.name, stage.kind, stage.requested(), versions, of_inputs])
    return asked


def kept_stages(stages: Sequence[Stage[Any]], store: Store, asked: Mapping[str, str]) -> dict[str, Kept]:
    """The stages that keep a folder, by name. store: the run's root. asked: as `requests` has them."""
    kept: dict[str, Kept] = {}
    for stage in reversed(stages):
        history = store.at("stages", stage.name)
        readers = [kept.get(name) for name in stage.kept_for]
        named = [reader.declaration.inputs.get(stage.name) for reader in readers if reader]
        if stage.keeps_its_data is not None:
            # Where a stage after it is kept, it is the one that that was made from.
            after = [one.declaration.inputs.get(stage.name) for one in kept.values()]
            found = _begun(history, asked[stage.name], stage.keeps_its_data == "done", [one for one in after if one])
        elif readers and len(named) == len(readers) and named[0]:
            found = _folder(history, named[0][:16])
        else:
            continue
        if found:
            kept[stage.name] = found
    return kept


def _begun(history: Store, asked: str, is_done: bool, named: Sequence[str]) -> Kept | None:
    """The folder that answers the request, and was begun (is_done: finished); the latest of several."""
    folders = [one[:16] for one in named[:1]] or [name for name in history.folders() if is_fingerprint(name)]
    found = [one for name in folders if (one := _folder(history, name, asked, is_done))]
    return max(found, key=lambda one: one.began, default=None)


def _folder(history: Store, name: str, asked: str | None = None, is_done: bool = True) -> Kept | None:
    tree = history.at(name).read_json(STARTED)
    if not tree or (asked is not None and tree.get(REQUEST) != asked):
        return None
    if is_done and not history.at(name).exists(MANIFEST):
        return None
    return Kept(name, Declaration.from_json(tree), begun(history.at(name)))


def begun(store: Store) -> str:
    """When a stage's folder was begun: UTC, ISO 8601. By the age of the file, whose bytes are the same at any time."""
    age = datetime.timedelta(seconds=store.age(STARTED))
    return (datetime.datetime.now(datetime.UTC) - age).isoformat(timespec="seconds")
