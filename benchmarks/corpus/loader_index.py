"""What the index of ten thousand shards takes on a node: bytes on disk, memory of all its processes, time to open.

In: shards and sequences a shard. Out: a report. The set is made up, with the keys and offsets of a packer's shards of
8K tokens. `PROCESSES` processes, as many as a node has ranks, open it and hold a loader over it at once, each a new
one that has imported what a rank imports; then each says what its first 4,096 positions are, which touch pages all over
the index. Memory is the rise of the proportional set size (PSS), in which a page that several share counts once.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import numpy as np
import psutil

from benchmarks.machine import machine
from storage.store import Store
from tokenization.loader.loader import Loader
from tokenization.loader.order import SequenceOrder
from tokenization.shards.index import ENTRY
from tokenization.shards.set_files import read_set, write_set_of
from tokenization.vocabulary import JointVocabulary

SHARDS, PER_SHARD, PROCESSES = 10_000, 1_024, 8
CONTEXT = 8_192
POSITIONS = 4_096
MEGABYTES, SECONDS = 400, 5.0
VOCABULARY = JointVocabulary.for_codebook(text_size=32_000, codebook_size=8_192)
NAME = "sets/books-train.json"


def loader_index_report(shards: int = SHARDS, per_shard: int = PER_SHARD, processes: int = PROCESSES) -> dict:
    """One row, and the targets."""
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as scratch:
        store = Store(scratch)
        _write(store, shards, per_shard)
        files = store.sizes("sets")
        opened = _open_by_all(scratch, processes)
    n_sequences = shards * per_shard
    row = {
        "shards": shards,
        "sequences": n_sequences,
        "processes": processes,
        "megabytes_on_disk": {name.rpartition(".")[2]: round(size / 1e6, 1) for name, size in files.items()},
        "bytes_a_sequence": round(sum(files.values()) / n_sequences, 1),
        "megabytes_of_all_processes": round(sum(one["pss"] for one in opened) / 1e6, 1),
        "megabytes_of_all_when_every_page_is_touched": round(sum(one["pss_of_all_pages"] for one in opened) / 1e6, 1),
        "seconds_to_open": round(max(one["seconds"] for one in opened), 2),
        "cpu_seconds_to_open": round(max(one["cpu_seconds"] for one in opened), 2),
        "seconds_to_first_positions": round(max(one["seconds_of_positions"] for one in opened), 3),
    }
    return {"benchmark": "loader_index", "machine": machine(), "claims": claims(row), "rows": [row]}


def claims(row: dict[str, Any]) -> list[dict]:
    """The targets, of all pages and by the clock of the slowest process."""
    where = f"{row['shards']:,} shards, {row['sequences']:,} sequences, {row['processes']} processes"
    found = (
        ("megabytes a node at most", MEGABYTES, row["megabytes_of_all_when_every_page_is_touched"]),
        ("seconds to open at most", SECONDS, row["seconds_to_open"]),
    )
    return [
        {"claim": f"index of the loader: {what}", "where": where, "target": target, "measured": measured}
        | {"met": measured <= target}
        for what, target, measured in found
    ]


def _write(store: Store, shards: int, per_shard: int) -> None:
    facts = [
        {
            "name": f"shards/books-train-{number // 8:05d}-{number % 8:05d}.tar",
            "context": CONTEXT,
            "n_sequences": per_shard,
            "n_tokens": per_shard * CONTEXT,
            "n_filled": per_shard * CONTEXT - number,
            "n_documents": 25 * per_shard,
            "n_examples": 25 * per_shard + number,
            "targets": {"text": per_shard * CONTEXT - number, "vision": number},
            "bytes": per_shard * 73_728,
            "sha256": f"{number:064x}",
            "keys": {"prefix": f"books-train-{number // 8:05d}-", "first": number % 8 * per_shard},
        }
        for number in range(shards)
    ]
    write_set_of(store, NAME, CONTEXT, VOCABULARY, "text", facts, (_entries(n, per_shard) for n in range(shards)))


def _entries(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    entries = np.zeros(count, ENTRY)
    entries["n_examples"] = rng.integers(10, 40, count)
    entries["length"] = 8 * CONTEXT + 216 + 4 * entries["n_examples"]
    entries["json_length"] = 230 * entries["n_examples"]
    entries["crc32"] = rng.integers(0, 2**32, count)
    blocks = 2 + -(-entries["length"].astype(np.int64) // 512) - (-entries["json_length"].astype(np.int64) // 512)
    entries["offset"] = 512 * (1 + np.cumsum(blocks) - blocks)
    return entries


def _open_by_all(folder: str, processes: int) -> list[dict[str, float]]:
    """What each process measured. They take each step together, and none ends before the last step of all."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    workers = [context.Process(target=_take_steps, args=(theirs, folder)) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    found: list[dict[str, float]] = [{} for _ in workers]
    for is_last in (False,) * _STEPS + (True,):
        for ours, _ in pipes:
            ours.send(is_last)
        for measured, (ours, _) in zip(found, pipes):
            measured |= {} if is_last else ours.recv()
    for worker in workers:
        worker.join()
    return found


def _take_steps(pipe: Connection, folder: str) -> None:
    steps = _measured(folder)
    while not pipe.recv():
        pipe.send(next(steps))


def _measured(folder: str) -> Iterator[dict[str, float]]:
    """The figures of one process, in `_STEPS` steps."""
    SequenceOrder(0, (2,)).at(np.arange(2))  # whose compiled code is loaded
    yield {}
    before = psutil.Process().memory_full_info().pss
    yield {}
    started, cpu = time.perf_counter(), time.process_time()
    shards = read_set(Store(folder), NAME)
    loader = Loader(_no_shard, [shards], SequenceOrder(0, (len(shards),)), POSITIONS)
    yield {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    started = time.perf_counter()
    places, *_ = next(loader._steps())
    lengths = [shards.locate(number)[2].length for _, number in places]
    yield {"seconds_of_positions": time.perf_counter() - started}
    yield {"pss": psutil.Process().memory_full_info().pss - before}
    assert len(lengths) == POSITIONS
    assert shards.entries is not None
    shards.entries["crc32"].max()
    yield {}
    yield {"pss_of_all_pages": psutil.Process().memory_full_info().pss - before}


_STEPS = 7


def _no_shard(name: str) -> BinaryIO:
    raise FileNotFoundError(name)
