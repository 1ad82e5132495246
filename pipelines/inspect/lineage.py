"""The stages behind what a stage made, found from the run's manifests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import MANIFEST, Declaration, Manifest, PlainRecord, StageOutput, read_manifest
from pipelines.sources.stage import SourcesStage
from pipelines.tokenize.stage import TokenizeStage
from storage.errors import UserError
from storage.store import Store

_RECORDS: dict[str, type[Any]] = {stage.kind: stage.record for stage in (SourcesStage, CodecStage, TokenizeStage)}


def stages_before(store: Store, manifest: Manifest[Any]) -> dict[str, StageOutput[Any]]:
    """Every stage that a stage's output depends on."""
    run = Store(store.url.rsplit("/", 3)[0])
    outputs: dict[str, StageOutput[Any]] = {}
    for name, fingerprint in manifest.declaration.inputs.items():
        home = run.at(manifest.input_folders.get(name, f"stages/{name}/{fingerprint[:16]}"))
        before = read_manifest(home, _RECORDS.get(kind_of(home) or "", PlainRecord))
        if before is None:
            raise UserError(f"{home.path()}: this stage, which it was made from, is gone; run the recipe again")
        outputs |= {name: StageOutput(home, before), **stages_before(home, before)}
    return outputs


def kind_of(store: Store) -> str | None:
    """What kind of stage a folder is of; None where it is none, or one that is not done."""
    with damage_named(store):
        tree = store.read_json(MANIFEST)
    return Declaration.from_json(tree).kind if tree else None


@contextlib.contextmanager
def damage_named(store: Store) -> Iterator[None]:
    """Have JSON that cannot be read raise a UserError that names the stage's folder."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f"{store.path()}: damaged ({error}); `ringworld inspect --verify` says what of it is") from None
