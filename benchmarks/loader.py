"""`ringworld bench loader`: from shards on disk to batches, beside `webdataset` on the same shards in the same run.

In: how many sequences of which context, and rounds. Out: a report: packed sequences a cpu-second and a second for each
system, and the targets beside what was measured. The shards are real ones, of LWM's mix of documents and random tokens,
made for the run and read from the page cache, one pass a round, the systems by turns; the best round of each counts.

Ours reads in its shuffled global order and checks every sequence against its checksum. webdataset reads the tars as
they lie, its shuffling off, and its safetensors members decoded by safetensors: once up to arrays, which is less than
a batch (no labels), and once made into the same micro-batches as ours. The floor copies a sequence's bytes out of the
page cache and its share of a batch to where it goes, and does nothing else.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.numpy
import webdataset
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.mixes import document_mix
from tokenization.document import PackedSequence
from tokenization.loader.join import join_sequences
from tokenization.loader.loader import Loader
from tokenization.loader.order import SequenceOrder
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

PER_CPU_SECOND = 5000
OVER_PEER = 2.0
VOCABULARY = JointVocabulary.for_codebook(32000, 8192)


@dataclass(frozen=True)
class Settings:
    """context: tokens of a sequence. sequences: in all. per_shard, batch: sequences of each. rounds: of each system."""

    context: int = 32768
    sequences: int = 1024
    per_shard: int = 256
    batch: int = 8
    rounds: int = 5


def loader_report(settings: Settings) -> dict:
    """Make the shards in a temporary folder, read them by every system, and say what was measured."""
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as scratch:
        folder = Path(scratch)
        shards = _write(folder, settings)
        rounds: dict[str, list[tuple[float, float]]] = {}
        for _ in range(settings.rounds):
            for name, read in _systems(folder, shards, settings).items():
                rounds.setdefault(name, []).append(_timed(read, settings.sequences))
    systems = {
        name: {
            "per_cpu_second": round(settings.sequences / min(cpu for cpu, _ in times)),
            "per_second": round(settings.sequences / min(wall for _, wall in times)),
        }
        for name, times in rounds.items()
    }
    entry = shards.stats[0].index[0]
    return {
        "benchmark": "loader",
        "settings": asdict(settings),
        "machine": {
            **machine(),
            **{name: version(name) for name in ("webdataset", "safetensors", "isal")},
            "load_average": round(os.getloadavg()[0], 1),
        },
        "bytes_a_sequence": {"read": entry.length, "in_a_batch": settings.context * 12},
        "claims": claims(systems, settings),
        "systems": systems,
    }


def claims(systems: dict[str, dict[str, int]], settings: Settings) -> list[dict]:
    """The targets, with what was measured and whether they are met; the first is for sequences of 32K tokens."""
    ours = systems["ringworld"]["per_cpu_second"]
    found: list[tuple[str, float, float]] = []
    if settings.context == 32768:
        found.append(("sequences a cpu-second at least", PER_CPU_SECOND, ours))
    over = ours / systems["webdataset, batches"]["per_cpu_second"]
    found.append(("over webdataset's own batches at least", OVER_PEER, over))
    return [
        {
            "claim": claim,
            "where": f"{settings.context} tokens, batches of {settings.batch}",
            "target": target,
            "measured": round(measured, 2),
            "met": measured >= target,
        }
        for claim, target, measured in found
    ]


def _write(folder: Path, settings: Settings) -> ShardSet:
    names: list[str] = []
    stats = []
    for start in range(0, settings.sequences, settings.per_shard):
        numbers = range(start, min(start + settings.per_shard, settings.sequences))
        names.append(f"{len(names):05d}.tar")
        with (folder / names[-1]).open("wb") as file:
            stats.append(write_shard(file, (_sequence(n, settings.context) for n in numbers), VOCABULARY))
    return ShardSet(settings.context, VOCABULARY, "text", tuple(names), tuple(stats))


def _sequence(number: int, context: int) -> PackedSequence:
    """A full sequence of LWM's mix: random tokens, each document's weights summing to 1, lineage as a packer's."""
    boundaries = document_mix("lwm", context, number).astype(np.int32)
    boundaries = np.delete(boundaries, np.flatnonzero(np.diff(boundaries[:-1]) < 2))
    tokens = np.random.default_rng(number).integers(3, VOCABULARY.size, context, dtype=np.int32)
    lengths = np.diff(boundaries)
    weight = np.repeat(1 / np.maximum(lengths - 1, 1), lengths).astype(np.float32)
    weight[boundaries[:-1]] = 0
    lineage = tuple(
        {
            "key": f"{number}-{n}",
            "source": "mix",
            "length": int(length),
            "provenance": {"url": f"s3://raw/{number}/{n}.mp4", "etag": f"{n:032x}"},
        }
        for n, length in enumerate(lengths)
    )
    return PackedSequence(f"mix-{number:08d}", tokens, boundaries, weight, len(lengths), lineage)


def _systems(folder: Path, shards: ShardSet, settings: Settings) -> dict[str, Callable[[], Iterator[object]]]:
    """Each gives batches, `settings.batch` sequences at a time, one pass over all."""
    return {
        "floor": lambda: _floor(folder, shards),
        "ringworld": lambda: _ours(folder, shards, settings, prefetch=2),
        "ringworld, no thread": lambda: _ours(folder, shards, settings, prefetch=0),
        "webdataset, arrays": lambda: _theirs(folder, shards, settings),
        "webdataset, batches": lambda: map(_stacked, _theirs(folder, shards, settings)),
        "webdataset, same batches": lambda: map(_joined, _theirs(folder, shards, settings)),
    }


def _timed(read: Callable[[], Iterator[object]], sequences: int) -> tuple[float, float]:
    """CPU and wall seconds of one pass, opening files and starting threads included."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in read():
        pass
    return time.process_time() - cpu, time.perf_counter() - wall


def _ours(folder: Path, shards: ShardSet, settings: Settings, prefetch: int) -> Iterator[object]:
    loader = Loader(
        lambda name: (folder / name).open("rb"),
        [shards],
        SequenceOrder(0, (len(shards),)),
        settings.batch,
        grad_accum=settings.batch,
        prefetch=prefetch,
    )
    return itertools.islice(iter(loader), settings.sequences // settings.batch)


def _theirs(folder: Path, shards: ShardSet, settings: Settings) -> Iterator[list[dict[str, np.ndarray]]]:
    pipeline = (
        webdataset.WebDataset([str(folder / name) for name in shards.names], shardshuffle=False)
        .to_tuple("__key__", "safetensors")
        .map_tuple(str, safetensors.numpy.load)
        .map(lambda sample: {"key": sample[0], **sample[1]})
    )
    return iter(pipeline.batched(settings.batch, collation_fn=list))


def _stacked(samples: list[dict]) -> dict:
    """What webdataset's own collation makes of arrays of one shape; `cu_seqlens` differ in length."""
    return {name: [sample[name] for sample in samples] for name in ("key", "cu_seqlens")} | {
        name: np.stack([sample[name] for sample in samples]) for name in ("tokens", "loss_weight")
    }


def _joined(samples: list[dict]) -> list[object]:
    return [join_sequences([PackedSequence(n_examples=0, **sample)]) for sample in samples]


def _floor(folder: Path, shards: ShardSet) -> Iterator[object]:
    for name, stats in zip(shards.names, shards.stats):
        with (folder / name).open("rb") as file:
            for entry in stats.index:
                body = os.pread(file.fileno(), entry.length, entry.offset)
                batch = np.empty(3 * stats.context, np.int32)
                words = np.frombuffer(body, np.int32, 2 * stats.context, len(body) - 8 * stats.context)
                batch[: 2 * stats.context] = words
                batch[2 * stats.context :] = words[: stats.context]
                yield batch


def print_loader(report: dict) -> None:
    """One line a system, then the targets."""
    table = Table(title="Packed sequences from shards to batches")
    for column, justify in (("system", "left"), ("a cpu-second", "right"), ("a second", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, figures in report["systems"].items():
        table.add_row(name, f"{figures['per_cpu_second']:,}", f"{figures['per_second']:,}")
    console = Console()
    console.print(table)
    for claim in report["claims"]:
        met = "met" if claim["met"] else "MISSED"
        console.print(
            f"{claim['claim']} {claim['target']:g}: {claim['measured']:g} at {claim['where']}: {met}", soft_wrap=True
        )
