"""What a folder holds, for `ringworld inspect`: a run, a stage, a checkpoint or a model; and whether it is intact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from model import checkpoint
from pipelines.dag import MANIFEST, STARTED
from pipelines.partitions import record_name
from pipelines.storage import Store
from tokenization.errors import UserError
from tokenization.shard_index import ShardSet
from tokenization.shards import verify_shard


def describe(url: str) -> dict[str, Any]:
    """A summary, plain JSON. Raises UserError when the folder is none that Ringworld makes."""
    store, kind = _recognise(url)
    return {"path": store.path(), "kind": kind, **_DESCRIBE[kind](store)}


def verify(url: str) -> list[str]:
    """Every way in which the files differ from what was committed; an empty list means intact."""
    store, kind = _recognise(url)
    return list(_VERIFY[kind](store))


def _recognise(url: str) -> tuple[Store, str]:
    store = Store(url.rstrip("/"))
    if store.exists(MANIFEST) or store.exists(STARTED):
        return store, "stage"
    if store.exists("stages"):
        return store, "run"
    if store.exists(checkpoint.COMMIT):
        return store, "checkpoint"
    if store.exists("config.json"):
        return store, "model"
    raise UserError(f"{url}: neither a run, a stage's folder, a checkpoint nor a model; give the path of one of these")


def _stage_folders(store: Store) -> Iterator[tuple[str, Store]]:
    for name in store.folders("stages"):
        for fingerprint in store.folders(f"stages/{name}"):
            yield f"{name}/{fingerprint}", store.at("stages", name, fingerprint)


def _describe_run(store: Store) -> dict[str, Any]:
    return {"stages": {name: _describe_stage(folder) for name, folder in _stage_folders(store)}}


def _describe_stage(store: Store) -> dict[str, Any]:
    manifest = store.read_json(MANIFEST)
    if manifest is None:
        started = store.read_json(STARTED) or {}
        return {
            "stage": started.get("stage"),
            "status": "started, not finished",
            "partitions": len(store.names("partitions")),
        }
    return {
        "stage": manifest["stage"],
        "status": "done",
        "finished": manifest["finished"],
        "seconds": manifest["seconds"],
        "figures": manifest.get("figures", {}),
        "quarantined": len(manifest["quarantine"]),
        "inputs": manifest["inputs"],
        **({"sets": manifest["outputs"]["sets"]} if "sets" in manifest.get("outputs", {}) else {}),
    }


def _describe_checkpoint(store: Store) -> dict[str, Any]:
    manifest = _checkpoint_manifest(store)
    return {
        "step": manifest.step,
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "precision": manifest.precision,
        "loader": manifest.client_state.get("loader"),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _describe_model(store: Store) -> dict[str, Any]:
    config = store.read_json("config.json") or {}
    keys = (
        "architectures",
        "vocab_size",
        "text_vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
    )
    rope = config.get("rope_parameters") or {}
    return {**{key: config.get(key) for key in keys}, "rope_theta": rope.get("rope_theta"), "files": store.names()}


def _checkpoint_manifest(store: Store) -> checkpoint.Manifest:
    parent, _, name = store.url.rpartition("/")
    return checkpoint.read_manifest(parent, int(name.rpartition("-")[2]), store.options)


def _verify_run(store: Store) -> Iterator[str]:
    for name, folder in _stage_folders(store):
        yield from (f"stages/{name}/{problem}" for problem in _verify_stage(folder))


def _verify_stage(store: Store) -> Iterator[str]:
    manifest = store.read_json(MANIFEST)
    if manifest is None:
        return
    outputs = manifest.get("outputs", {})
    damaged = set()
    for name, sha256 in outputs.get("files", {}).items():
        for problem in _verify_hash(store, name, sha256):
            damaged.add(name)
            yield problem
    for part in outputs.get("partitions", []):
        yield from _verify_hash(store, part["file"], part["sha256"])
        if not store.exists(record_name(part["partition"])):
            yield f"{record_name(part['partition'])}: missing"
    for splits in outputs.get("sets", {}).values():
        for name in {entry["file"] for entry in splits.values()} - damaged:
            yield from _verify_shards(store, ShardSet.from_json(store.read_json(name) or {}))
    for name in store.folders(CHECKPOINT_FOLDER):
        yield from (
            f"{CHECKPOINT_FOLDER}/{name}: {flaw}" for flaw in _verify_checkpoint(store.at(CHECKPOINT_FOLDER, name))
        )


def _verify_hash(store: Store, name: str, sha256: str) -> Iterator[str]:
    try:
        found = store.sha256(name)
    except FileNotFoundError:
        yield f"{name}: missing"
        return
    if found != sha256:
        yield f"{name}: sha256 is {found}, the manifest says {sha256}"


def _verify_shards(store: Store, shards: ShardSet) -> Iterator[str]:
    for name, stats in zip(shards.names, shards.stats, strict=True):
        try:
            with store.open(name) as file:
                yield from (f"{name}: {problem}" for problem in verify_shard(file, stats))
        except FileNotFoundError:
            yield f"{name}: missing"


def _verify_checkpoint(store: Store) -> Iterator[str]:
    parent, _, name = store.url.rpartition("/")
    flaw = checkpoint.verify(parent, int(name.rpartition("-")[2]), options=store.options)
    if flaw is not None:
        yield flaw


def _verify_model(store: Store) -> Iterator[str]:
    for name in store.names():
        if name.endswith(".safetensors"):
            yield from _verify_safetensors(store, name)


def _verify_safetensors(store: Store, name: str) -> Iterator[str]:
    """A model folder carries no hashes; that its tensors can all be read is what can be said of it alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(store.fetch_folder() / name, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                tensors.get_slice(key)
    except (SafetensorError, OSError) as error:
        yield f"{name}: {error}"


CHECKPOINT_FOLDER = "checkpoints"
_DESCRIBE: dict[str, Callable[[Store], dict[str, Any]]] = {
    "run": _describe_run,
    "stage": _describe_stage,
    "checkpoint": _describe_checkpoint,
    "model": _describe_model,
}
_VERIFY: dict[str, Callable[[Store], Iterator[str]]] = {
    "run": _verify_run,
    "stage": _verify_stage,
    "checkpoint": _verify_checkpoint,
    "model": _verify_model,
}
