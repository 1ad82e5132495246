"""`ringworld bench store`: one object of an S3 server on this machine, read and written by our own door and by s3fs.

In: megabytes. Out: megabytes per CPU second of the client and per second, and what its memory grew by. Each round is a
process of its own, that has met the store before the clock starts; rounds alternate and the best of each system counts.
The server takes its time from the same cores, so that seconds say less than CPU seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import machine
from storage.errors import UserError
from testing.s3_server import ObjectStore, object_store

SYSTEMS = ("ringworld", "s3fs")
TASKS = ("read", "write")
READ_BYTES = 2**20
WRITES = 3  # at most of each system: the server has room for a few gigabytes, and keeps what was replaced
TIMES = 2.0
"""What ours is to be, read, of s3fs per CPU second."""


def store_report(megabytes: int, rounds: int) -> dict[str, Any]:
    """A row a system and task, and the target. Raises UserError where there is no S3 server or no s3fs."""
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as folder, object_store() as store:
        file = Path(folder) / "object"
        file.write_bytes(np.random.default_rng(0).bytes(megabytes * 10**6))
        store.fs.put_file(str(file), "bench/object")
        runs: dict[tuple[str, str], list[dict[str, float]]] = {(task, name): [] for task in TASKS for name in SYSTEMS}
        for number in range(rounds):
            for (task, system), found in runs.items():
                if task == "read" or number < WRITES:
                    found.append(_apart(store, system, task, file))
    best = {which: max(found, key=lambda figures: figures["mb_per_cpu_s"]) for which, found in runs.items()}
    rows = [{"task": task, "system": system, **figures} for (task, system), figures in best.items()]
    times = round(best["read", "ringworld"]["mb_per_cpu_s"] / best["read", "s3fs"]["mb_per_cpu_s"], 2)
    return {
        "benchmark": "store",
        "settings": {"megabytes": megabytes, "rounds": rounds, "read_bytes": READ_BYTES},
        "machine": machine(),
        "claims": [
            {
                "claim": "read per CPU second, times s3fs, at least",
                "target": TIMES,
                "measured": times,
                "met": times >= TIMES,
            }
        ],
        "rows": rows,
    }


def _apart(store: ObjectStore, system: str, task: str, file: Path) -> dict[str, float]:
    """A round in a process of its own, whose imports and buffers are no other's."""
    asked = json.dumps([system, task, store.options, str(file)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.store"], input=asked, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{system} could not {task} the object: {' '.join(done.stderr.split())[-300:]}")
    return dict(json.loads(done.stdout))


def measure(system: str, task: str, options: dict[str, Any], file: Path) -> dict[str, float]:
    """One system at one task, in this process."""
    if system == "s3fs":
        import s3fs

        fs, name = s3fs.S3FileSystem(**options), "bench/object"
    else:
        from storage.urls import filesystem

        fs, name = filesystem("s3://bench/object", options)
    with fs.open(name) as source:
        source.read(1)
    before = psutil.Process().memory_info().rss
    cpu, wall = time.process_time(), time.perf_counter()
    size = 0
    if task == "write":
        fs.put_file(str(file), f"{name}-{system}")
        size = file.stat().st_size
    else:
        with fs.open(name) as source:
            while piece := source.read(READ_BYTES):
                size += len(piece)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "mb_per_cpu_s": round(size / 1e6 / cpu),
        "mb_per_s": round(size / 1e6 / wall),
        "grown_mib": round((_most_memory() - before) / 2**20),
    }


def _most_memory() -> int:
    """The most bytes that this process has had resident."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def print_store(report: dict[str, Any]) -> None:
    """One line a row, then the target."""
    print(f"{'task':<8}{'system':<12}{'MB/CPU s':>10}{'MB/s':>8}{'memory MiB':>12}")
    for row in report["rows"]:
        print(
            f"{row['task']:<8}{row['system']:<12}{row['mb_per_cpu_s']:>10.0f}{row['mb_per_s']:>8.0f}"
            f"{row['grown_mib']:>12.0f}"
        )
    for claim in report["claims"]:
        verdict = "met" if claim["met"] else "MISSED"
        print(f"{claim['claim']} {claim['target']:g}: {claim['measured']:g}, {verdict}")


if __name__ == "__main__":
    _system, _task, _options, _file = json.loads(sys.stdin.read())
    print(json.dumps(measure(_system, _task, _options, Path(_file))))
