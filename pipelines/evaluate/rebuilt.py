"""`--rebuild evaluate` of an evaluation with holes: what was measured stays, and the holes alone are tried again."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

from pipelines.dag.manifest import MANIFEST, STARTED, Declaration, is_fingerprint, read_manifest, shared_folder
from pipelines.evaluate.record import EvaluateRecord
from storage.store import Store

log = logging.getLogger("ringworld")


def take_cells_before(store: Store) -> None:
    """Copy what the evaluation of the same inputs and settings, one rebuild before, has measured, where it has holes.

    store: of the stage's new folder, which has said what it is. An evaluation without holes is measured anew.
    """
    before = _before(store)
    if before is None:
        return
    present = set(_files(store))
    for name in sorted(_files(before), key=lambda name: name.startswith("partitions/")):  # records last
        if name not in present:
            with before.open(name) as source, store.writing(name) as file:
                shutil.copyfileobj(source, file)
    log.info("evaluate: keeps what was measured before, and tries the holes again")


def _before(store: Store) -> Store | None:
    """The folder of the rebuild before, if it has holes."""
    started = store.read_json(STARTED)
    declaration = Declaration.from_json(started) if started else None
    if declaration is None or not declaration.rebuild:
        return None
    history = shared_folder(store)
    fingerprint = replace(declaration, rebuild=declaration.rebuild - 1).fingerprint[:16]
    if not is_fingerprint(fingerprint) or fingerprint not in history.folders():
        return None
    manifest = read_manifest(history.at(fingerprint), EvaluateRecord)
    return history.at(fingerprint) if manifest and manifest.record.figures.holes else None


def _files(store: Store) -> list[str]:
    folders = ("partitions", "pictures", "counts")
    return [name for name in store.names() if name not in (MANIFEST, STARTED) and name.partition("/")[0] in folders]
