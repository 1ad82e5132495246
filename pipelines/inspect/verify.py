"""Whether what was committed is still there, byte for byte: every file below a run, a stage, a checkpoint or a model.

In: the folder's URL. Out: every way in which its files differ from what was committed, each naming its file. Files are
read once each, several at a time in threads (hashing and waiting for a store let others run), a few megabytes of each
in memory; of a shard also its members, counts and every sequence are compared with the index.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import call

from model import checkpoint
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import PlainRecord, StageOutput, read_manifest
from pipelines.export.folder import CONFIG, read_description
from pipelines.inspect.describe import checkpoint_manifest, recognise, stage_folders
from pipelines.inspect.files import is_file
from pipelines.tokenize.record import PARTITIONS, TokenizeRecord, read_partitions
from pipelines.tokenize.stage import TokenizeStage
from pipelines.train.job import CHECKPOINTS
from storage.errors import UserError
from storage.store import Store
from tokenization.shards.index import ShardStats
from tokenization.shards.set_files import read_set
from tokenization.shards.shard import verify_shard
from tokenization.vocabulary import JointVocabulary

THREADS = min(16, 4 * (os.cpu_count() or 1))
"""More than cores: of an object store most threads wait. Each has one file open."""
_CHECKS_AT_ONCE = 4096  # each takes a kilobyte or two while it waits for its thread

Check = Callable[[], list[str]]
"""Reads one file; returns what is wrong with it."""


def verify(url: str, threads: int = THREADS) -> list[str]:
    """Every way in which the files differ from what was committed, in the order of the files; none means intact.

    Raises UserError when that is no folder that Ringworld makes, and when its store does not answer.
    """
    if is_file(url):
        raise UserError(
            f"{url}: a file alone does not say what was committed; leave out --verify, or name its stage's folder"
        )
    store, kind = recognise(url)
    checks = list(_CHECKS[kind](store))
    problems = []
    with bar("verify", len(checks), "file") as line, ThreadPoolExecutor(threads, "verify") as pool:
        for start in range(0, len(checks), _CHECKS_AT_ONCE):
            for found in pool.map(call, checks[start : start + _CHECKS_AT_ONCE]):
                problems += found
                line.advance(1)
    return problems


def _of_run(store: Store) -> Iterator[Check]:
    checked: set[str] = set()
    for name, folder in stage_folders(store):
        yield from _of_stage(folder, f"stages/{name}/", checked)


def _of_stage(store: Store, prefix: str = "", checked: set[str] | None = None) -> Iterator[Check]:
    """checked: names of files that fingerprints share, which are checked for the first of them."""
    checked = set() if checked is None else checked
    manifest = read_manifest(store, PlainRecord)
    if manifest is None:
        return
    outputs, shared = manifest.record.outputs, StageOutput(store, manifest).shared
    files = outputs.get("files") or {}
    for name, sha256 in files.items():
        yield partial(_check, f"{prefix}{name}", _hash, store, name, sha256)
    is_apart = shared.url != store.url
    beside = f"{prefix.rstrip('/').rpartition('/')[0]}/".lstrip("/") if is_apart else prefix
    if manifest.declaration.kind == TokenizeStage.kind and not _damaged(store, files, PARTITIONS):
        tokenized = read_manifest(store, TokenizeRecord)
        for part in read_partitions(StageOutput(store, tokenized)) if tokenized else ():
            if (shown := f"{beside}{part.file}") not in checked:
                checked.add(shown)
                yield partial(_check, shown, _hash, shared, part.file, part.sha256)
    for name in sorted({entry["file"] for splits in outputs.get("sets", {}).values() for entry in splits.values()}):
        stem = (name.partition("/")[2] if is_apart else name).rpartition(".")[0]
        if any(_damaged(store, files, file) for file in files if file.rpartition(".")[0] == stem):
            continue
        shards = read_set(shared, name)
        for shard, stats in zip(shards.names, shards.stats, strict=True):
            if (shown := f"{beside}{shard}") not in checked:
                checked.add(shown)
                yield partial(_check, shown, _shard, shared, shard, stats, shards.vocabulary)
    for name in store.folders(CHECKPOINTS):
        yield from _of_checkpoint(store.at(CHECKPOINTS, name), f"{prefix}{CHECKPOINTS}/{name}/")


def _damaged(store: Store, files: Mapping[str, str], name: str) -> bool:
    """Whether a list of files is damaged, so that what it lists cannot be checked; `files` has it named already."""
    return name in files and bool(_check(name, _hash, store, name, files[name]))


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
            yield partial(_check, f"{prefix}{name}", _hash, store, name, entry.sha256)


def _of_model(store: Store) -> Iterator[Check]:
    """An exported model has the hashes of all its files, and the folder that training leaves those in its manifest."""
    if (exported := read_description(store)) is not None:
        if not exported.files:
            yield partial(list, [f"{CONFIG}: missing, for the export was not finished"])
        for name, sha256 in exported.files.items():
            yield partial(_check, name, _hash, store, name, sha256)
        return
    for name in store.names():
        if name.endswith(".safetensors"):
            yield partial(_check, name, _safetensors, store, name)


def _check(shown_name: str, find: Callable[..., list[str]], *arguments: object) -> list[str]:
    """What `find` finds wrong with a file. Raises UserError for a store that does not answer: its file may be whole."""
    try:
        problems = find(*arguments)
    except FileNotFoundError:
        problems = ["missing"]
    except UserError:
        raise
    except OSError as error:
        problems = [f"cannot be read ({error})"]
    return [f"{shown_name}: {problem}" for problem in problems]


def _hash(store: Store, name: str, sha256: str) -> list[str]:
    found = store.sha256(name)
    return [] if found == sha256 else [f"sha256 is {found}, the manifest says {sha256}"]


def _shard(store: Store, name: str, stats: ShardStats, vocabulary: JointVocabulary) -> list[str]:
    with store.open(name) as file:
        return list(verify_shard(file, stats, vocabulary))


def _safetensors(store: Store, name: str) -> list[str]:
    """Of a model without hashes all that can be checked is that its tensors can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(store.fetch_folder() / name, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                tensors.get_slice(key)
    except SafetensorError as error:
        return [f"cannot be read ({error})"]
    return []


_CHECKS: dict[str, Callable[[Store], Iterator[Check]]] = {
    "run": _of_run,
    "stage": _of_stage,
    "checkpoint": _of_checkpoint,
    "model": _of_model,
}
