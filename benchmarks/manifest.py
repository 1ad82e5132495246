"""`ringworld bench manifest`: a checkpoint's `COMMIT` of a 7B model on many ranks, beside JSON of a dict a file.

In: ranks of ZeRO-3, which each hold a part of every parameter. Out: milliseconds of CPU to write and to read it, and
megabytes. Every save spends the first on rank 0, beside the training; every resume spends the second on every rank.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.machine import machine
from model.checkpoint.manifest import FileEntry, Manifest, Range
from model.checkpoint.writer import random_name
from model.llama.config import llama_config
from model.llama.initial_weights import weight_shapes


def manifest_7b(ranks: int) -> Manifest:
    """What rank 0 commits of LWM 7B; hashes are made up."""
    shapes = weight_shapes(llama_config("7B", 40_448, 2**20, 5e7))
    files, sha256 = {}, hashlib.sha256(b"").hexdigest()
    for rank in range(ranks):
        parts = {name: -(-shape.numel() // ranks) for name, shape in shapes.items()}
        ranges = tuple(Range(name, rank * part, part) for name, part in parts.items())
        files[f"rank-{rank:05d}-0000.safetensors"] = FileEntry(2**28, sha256, rank, ranges, 2**17, sha256)
        files[random_name(rank, ".safetensors")] = FileEntry(2**12, sha256, rank)
    parameters = {name: (tuple(shape), int(len(shape) < 2)) for name, shape in shapes.items()}
    random = tuple(random_name(rank, ".safetensors") for rank in range(ranks))
    return Manifest(1000, ranks, ranks // 8, 8, 3, "bf16", parameters, (1000, 1000), {}, files, random)


def manifest_report(ranks: int, rounds: int) -> dict[str, Any]:
    """A row a way of writing; by turns, the fastest round of each counts."""
    manifest = manifest_7b(ranks)
    ways: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]] = {
        "ringworld": (manifest.to_bytes, Manifest.from_bytes),
        "dicts": (lambda: json.dumps(asdict(manifest), sort_keys=True).encode(), json.loads),
    }
    seconds: dict[tuple[str, str], list[float]] = {(way, task): [] for way in ways for task in ("write", "read")}
    sizes = {}
    for _ in range(rounds):
        for way, (write, read) in ways.items():
            started = time.process_time()
            data = write()
            written = time.process_time()
            read(data)
            seconds[way, "write"].append(written - started)
            seconds[way, "read"].append(time.process_time() - written)
            sizes[way] = len(data)
    return {
        "benchmark": "manifest",
        "settings": {"ranks": ranks, "rounds": rounds},
        "machine": machine(),
        "rows": [
            {
                "way": way,
                "write_ms": round(1000 * min(seconds[way, "write"]), 1),
                "read_ms": round(1000 * min(seconds[way, "read"]), 1),
                "mb": round(sizes[way] / 1e6, 2),
            }
            for way in ways
        ],
    }


def print_manifest(report: dict[str, Any]) -> None:
    """The rows as a table."""
    print(f"COMMIT of a 7B model on {report['settings']['ranks']} ranks of ZeRO-3, CPU milliseconds")
    for row in report["rows"]:
        print(f"  {row['way']:10} write {row['write_ms']:8}  read {row['read_ms']:8}  {row['mb']:6} MB")
