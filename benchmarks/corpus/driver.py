"""What a stage of a hundred thousand partitions costs its driver, and how long it takes to find them all committed.

In: how many partitions. Out: a report of two rows:

    run      the partitions run as Ray tasks that make nothing: CPU seconds and memory of the driver for each.
    resumed  all of them are committed on a real S3 server, and every request is answered 25 ms late: seconds until the
             driver has the record of each.

The memory is what the driver's resident set grows by, after two hundred other partitions have been run.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import psutil

from benchmarks.machine import machine
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.dag.partitions import run_partitions
from pipelines.dag.records import FooterRecords, Record
from pipelines.recipe import Resources
from pipelines.tokenize.record import TokenizedPartition
from pipelines.tokenize.tokenize_task import DOCUMENTS, MADE
from storage.store import Store
from testing.empty_partitions import record_of, submitted
from testing.faulty_proxy import Faults
from testing.s3_server import ObjectStore, object_store

PARTITIONS = 100_000
CPU_MS, KIB, RESUME_S, LATENCY = 1.0, 1.0, 60.0, 0.025
_KEPT = tuple(entry.name for entry in fields(TokenizedPartition))


def driver_report(partitions: int = PARTITIONS) -> dict[str, Any]:
    """Both rows, and the targets."""
    names = [f"clips-train-{number:05x}b20-{number:016x}" for number in range(partitions)]
    with ray_instance(None, Capacity().plus(Resources(), 1)):
        run = _run(names)
    with object_store() as store:
        resumed = _resumed(names, store)
    return {"benchmark": "driver", "machine": machine(), "claims": claims(run, resumed), "rows": [run, resumed]}


def claims(run: dict[str, Any], resumed: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, of a hundred thousand partitions."""
    found = [
        ("driver: CPU ms a partition", CPU_MS, run["cpu_ms"]),
        ("driver: KiB a partition", KIB, run["kib"]),
        ("a hundred thousand committed partitions found at 25 ms a request: seconds", RESUME_S, resumed["seconds"]),
    ]
    return [
        {"claim": f"{claim} at most", "target": target, "measured": measured, "met": measured <= target}
        for claim, target, measured in found
    ]


def _run(names: Sequence[str]) -> dict[str, Any]:
    kept: dict[str, TokenizedPartition] = {}
    submit = submitted()

    def on_done(record: Record) -> None:
        record.pop(MADE)
        kept[record["partition"]] = TokenizedPartition(**{name: record[name] for name in _KEPT})

    def run(some: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            records = FooterRecords(Store(folder), DOCUMENTS)
            run_partitions("tokenize", submit, some, records, Resources(workers=4), on_done)

    run([f"before-{number}" for number in range(200)])
    kept.clear()
    process = psutil.Process()
    memory, cpu, started = process.memory_info().rss, time.process_time(), time.monotonic()
    run(names)
    return {
        "state": "run",
        "partitions": len(kept),
        "cpu_ms": round(1e3 * (time.process_time() - cpu) / len(names), 3),
        "wall_ms": round(1e3 * (time.monotonic() - started) / len(names), 3),
        "kib": round((process.memory_info().rss - memory) / 1024 / len(names), 3),
    }


def _resumed(names: Sequence[str], store: ObjectStore) -> dict[str, Any]:
    url = f"{store.url}/stage"
    folder = Store(url, store.options)
    local = threading.local()

    def put(name: str) -> None:  # an object in the place of the documents, of which the records tell all
        if not hasattr(local, "store"):
            local.store = Store(url, store.options)
        with local.store.writing(f"{DOCUMENTS}/{name}.parquet") as file:
            file.write(b"documents")

    with ThreadPoolExecutor(32) as pool:
        for _ in pool.map(put, names):
            pass
    records = FooterRecords(folder, DOCUMENTS)
    for name in names:
        records.add(record_of(name))
    records.flush()
    proxy = Faults.before(store.endpoint)
    proxy.latency = LATENCY
    late = Store(url, {**store.options, "endpoint_url": proxy.endpoint})
    started, cpu = time.monotonic(), time.process_time()
    count = sum(1 for _ in FooterRecords(late, DOCUMENTS).load(names))
    return {
        "state": "resumed",
        "partitions": count,
        "requests": len(proxy.lines),
        "seconds": round(time.monotonic() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
    }
