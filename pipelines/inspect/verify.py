"""Whether what was committed is still there, byte for byte: every file below a run, a stage, a checkpoint or a model.

In: the folder's URL. Out: every way in which its files differ from what was committed, each naming its file. Files are
read once each, several at a time in threads (hashing and waiting for a store let others run), a few megabytes of each
in memory; of a shard also its members, counts and every sequence are compared with the index.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from model import checkpoint
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import MANIFEST
from pipelines.dag.partitions import record_name
from pipelines.inspect.describe import checkpoint_manifest, recognise, stage_folders
from storage.errors import UserError
from storage.store import Store
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import verify_shard
from tokenization.vocabulary import JointVocabulary

THREADS = min(16, 4 * (os.cpu_count() or 1))
"""More than cores: of an object store most threads wait. Each holds one file open."""

Check = Callable[[], list[str]]
"""Reads one file; returns what is wrong with it."""


def verify(url: str, threads: int = THREADS) -> list[str]:
    """Every way in which the files differ from what was committed, in the order of the files; none means intact.

    Raises UserError when the folder is none that Ringworld makes, and when its store does not answer.
    """
    store, kind = recognise(url)
    checks = list(_CHECKS[kind](store))
    with bar("verify", len(checks), "file") as line:
        problems = []
        for found in _in_order(checks, threads):
            problems += found
            line.advance(1)
    return problems


def _in_order(checks: list[Check], threads: int) -> Iterator[list[str]]:
    """What each check finds, in their order; two a thread are under way or waiting to be looked at."""
    running: deque[Future[list[str]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for check in checks:
                if len(running) == 2 * threads:
                    yield running.popleft().result()
                running.append(pool.submit(check))
            while running:
                yield running.popleft().result()
        finally:
            for left in running:
                left.cancel()


def _of_run(store: Store) -> Iterator[Check]:
    for name, folder in stage_folders(store):
        yield from _of_stage(folder, f"stages/{name}/")


def _of_stage(store: Store, prefix: str = "") -> Iterator[Check]:
    manifest = store.read_json(MANIFEST)
    if manifest is None:
        return
    outputs = manifest.get("outputs", {})
    files = outputs.get("files", {})
    for name, sha256 in files.items():
        yield partial(_hash, store, name, sha256, prefix)
    records = set(store.names("partitions")) if outputs.get("partitions") else set()
    for part in outputs.get("partitions", []):
        yield partial(_hash, store, part["file"], part["sha256"], prefix)
        if record_name(part["partition"]) not in records:
            yield partial(list, [f"{prefix}{record_name(part['partition'])}: missing"])
    for name in sorted({entry["file"] for splits in outputs.get("sets", {}).values() for entry in splits.values()}):
        # A damaged index says nothing of its shards; that it is damaged, the files above have said.
        if name in files and _hash(store, name, files[name]):
            continue
        shards = ShardSet.from_json(store.read_json(name) or {})
        for shard, stats in zip(shards.names, shards.stats, strict=True):
            yield partial(_shard, store, shard, stats, shards.vocabulary, prefix)
    for name in store.folders(CHECKPOINTS):
        yield from _of_checkpoint(store.at(CHECKPOINTS, name), f"{prefix}{CHECKPOINTS}/{name}/")


def _of_checkpoint(store: Store, prefix: str = "") -> Iterator[Check]:
    try:
        manifest = checkpoint_manifest(store)
    except FileNotFoundError:
        if store.names():  # some object stores go on listing a folder whose last object is gone
            yield partial(list, [f"{prefix}{checkpoint.COMMIT}: missing"])
    except (ValueError, KeyError, TypeError):
        yield partial(list, [f"{prefix}{checkpoint.COMMIT}: cannot be read"])
    else:
        for name, entry in manifest.files.items():
            yield partial(_hash, store, name, entry.sha256, prefix)


def _of_model(store: Store) -> Iterator[Check]:
    for name in store.names():
        if name.endswith(".safetensors"):
            yield partial(_safetensors, store, name)


def _hash(store: Store, name: str, sha256: str, prefix: str = "") -> list[str]:
    try:
        found = store.sha256(name)
    except FileNotFoundError:
        return [f"{prefix}{name}: missing"]
    except OSError as error:
        return [_unreadable(f"{prefix}{name}", error)]
    return [] if found == sha256 else [f"{prefix}{name}: sha256 is {found}, the manifest says {sha256}"]


def _shard(store: Store, name: str, stats: ShardStats, vocabulary: JointVocabulary, prefix: str) -> list[str]:
    try:
        with store.open(name) as file:
            return [f"{prefix}{name}: {problem}" for problem in verify_shard(file, stats, vocabulary)]
    except FileNotFoundError:
        return [f"{prefix}{name}: missing"]
    except OSError as error:
        return [_unreadable(f"{prefix}{name}", error)]


def _safetensors(store: Store, name: str) -> list[str]:
    """A model folder carries no hashes; that its tensors can all be read is what can be said of it alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(store.fetch_folder() / name, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                tensors.get_slice(key)
    except (SafetensorError, OSError) as error:
        return [_unreadable(name, error)]
    return []


def _unreadable(name: str, error: Exception) -> str:
    """A file that the disk does not give; a store that does not answer says nothing of its files."""
    if isinstance(error, UserError):
        raise error
    return f"{name}: cannot be read ({error})"


CHECKPOINTS = "checkpoints"
_CHECKS: dict[str, Callable[[Store], Iterator[Check]]] = {
    "run": _of_run,
    "stage": _of_stage,
    "checkpoint": _of_checkpoint,
    "model": _of_model,
}
