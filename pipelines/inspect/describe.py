"""What a place holds, for `ringworld inspect`: a run, a stage, a checkpoint, a model, or a file of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from model import checkpoint
from pipelines.dag.manifest import MANIFEST, STARTED, PlainRecord, is_fingerprint, read_manifest
from pipelines.export.folder import CONFIG, DESCRIPTION, read_description
from pipelines.inspect.files import describe_file, is_file
from storage.errors import UserError
from storage.store import Store

_MARKS = {
    "stage": (MANIFEST, STARTED),
    "run": ("stages",),
    "checkpoint": (checkpoint.COMMIT,),
    "model": (CONFIG, DESCRIPTION),
}
"""Names of which a folder of a kind has one at least; the first kind in this order counts."""


def describe(url: str) -> dict[str, Any]:
    """A summary, plain JSON. Raises UserError when the folder or file is none that Ringworld makes."""
    if is_file(url):
        return {"path": url, **describe_file(url)}
    store, kind = recognise(url)
    return {"path": store.path(), "kind": kind, **_DESCRIBE[kind](store)}


def recognise(url: str) -> tuple[Store, str]:
    """The folder, and what it is: a run, a stage, a checkpoint or a model. Raises UserError on anything else."""
    store = Store(url.rstrip("/"))
    for kind, names in _MARKS.items():
        if any(store.exists(name) for name in names):
            return store, kind
    raise UserError(f"{url}: neither a run, a stage's folder, a checkpoint nor a model; give the path of one of these")


def stage_folders(store: Store) -> Iterator[tuple[str, Store]]:
    """The folders of a run's stages, by `name/fingerprint`."""
    for name in store.folders("stages"):
        for fingerprint in filter(is_fingerprint, store.folders(f"stages/{name}")):
            yield f"{name}/{fingerprint}", store.at("stages", name, fingerprint)


def _describe_stage(store: Store) -> dict[str, Any]:
    manifest = read_manifest(store, PlainRecord)
    if manifest is None:
        started = store.read_json(STARTED) or {}
        return {"stage": started.get("stage"), "status": "started, not finished"}
    outputs = manifest.record.outputs
    return {
        "stage": manifest.declaration.stage,
        "status": "done",
        "finished": manifest.finished,
        "seconds": manifest.seconds,
        "figures": manifest.record.figures,
        "quarantined": manifest.quarantined,
        "inputs": manifest.declaration.inputs,
        "made_by": manifest.made_by,
        **({"sets": outputs["sets"]} if "sets" in outputs else {}),
    }


def _describe_checkpoint(store: Store) -> dict[str, Any]:
    manifest = checkpoint_manifest(store)
    return {
        **{key: getattr(manifest, key) for key in ("step", "world_size", "zero_stage", "precision")},
        "loader": manifest.client_state.get("loader"),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _describe_model(store: Store) -> dict[str, Any]:
    config, exported = store.read_json(CONFIG) or {}, read_description(store)
    sizes = ("vocab_size", "modality_sizes", "text_vocab_size", "hidden_size", "num_hidden_layers")
    keys = ("architectures", *sizes, "max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    own = {**{key: config.get(key) for key in keys}, "rope_theta": rope.get("rope_theta"), "files": store.names()}
    if exported is None:
        return own
    codecs = {name: codec.folder for name, codec in exported.codecs.items()}
    return {
        "name": exported.name,
        "is_whole": bool(exported.files and config),
        **asdict(exported.origin),
        **own,
        "codecs": codecs,
    }


def checkpoint_manifest(store: Store) -> checkpoint.manifest.Manifest:
    """What was committed of a checkpoint's folder. Raises FileNotFoundError, ValueError, KeyError or TypeError."""
    parent, _, name = store.url.rpartition("/")
    return checkpoint.read_manifest(Store(parent, store.options), int(name.rpartition("-")[2]))


_DESCRIBE: dict[str, Callable[[Store], dict[str, Any]]] = {
    "run": lambda store: {"stages": {name: _describe_stage(folder) for name, folder in stage_folders(store)}},
    "stage": _describe_stage,
    "checkpoint": _describe_checkpoint,
    "model": _describe_model,
}
