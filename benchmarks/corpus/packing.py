"""Documents from Parquet to shards, documents per CPU second, beside the floor of what has to be read, hashed, written.

In: how many documents. Out: a report: documents per CPU second of

    pack            the pack stage's own way: columns read, packed and written as shards.
    floor           the Parquet's columns read and thrown away; the bytes of the same shards hashed (SHA-256 and CRC-32)
                    and written, a sequence at a time.

Documents are of 330 tokens on average, with keys and provenance as the tokenize stage gives records of text. Files are
local. Rounds alternate between both, and the fastest counts.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from benchmarks.machine import machine
from tokenization.document import Document
from tokenization.packing.pack import pack_batches
from tokenization.shards.document_parquet import read_batches, write_documents
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

DOCUMENTS, CONTEXT, PER_SHARD = 100_000, 8_192, 128
MEAN_TOKENS, SPREAD = 330, 0.3
TARGET, OVER_FLOOR = 200_000, 1.5
"""Documents per CPU second, or at least so many times the floor's CPU seconds at most."""
VOCABULARY = JointVocabulary.for_codebook(text_size=32_000, codebook_size=8_192)


def documents(count: int) -> Iterator[Document]:
    """Records of text in files of a thousand, whose ids are as frequent as words are."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, count).clip(16, CONTEXT).astype(int)
    for number, length in enumerate(lengths.tolist()):
        file, record = divmod(number, 1000)
        url = f"s3://corpus/books/part-{file:05d}.jsonl.zst"
        where = {"url": url, "etag": f"{file:032x}", "record": record, "fields": "text"}
        tokens = (rng.pareto(1.0, length) * 20 + 3).clip(3, VOCABULARY.text_size - 1).astype(np.int32)
        yield Document(f"books/part-{file:05d}.jsonl.zst#{record}", "books", tokens, ((1, length),), where)


def packing_report(count: int = DOCUMENTS, rounds: int = 5) -> dict:
    """Both ways over the same documents, and the target."""
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as scratch:
        folder = Path(scratch)
        source = folder / "documents.parquet"
        with source.open("wb") as file:
            write_documents(file, documents(count))
        shards = [path.read_bytes() for path in pack_files(source, folder / "first")]
        seconds: dict[str, list[float]] = {"pack": [], "floor": []}
        for number in range(rounds):
            for name, way in (("pack", pack_files), ("floor", lambda *paths: floor(shards, *paths))):
                seconds[name].append(_cpu_seconds(way, source, folder / f"{name}-{number}"))
    rates = {name: round(count / min(times)) for name, times in seconds.items()}
    row = {
        "documents": count,
        "mean_tokens": MEAN_TOKENS,
        "context": CONTEXT,
        "shards": len(shards),
        "megabytes_of_shards": round(sum(map(len, shards)) / 1e6, 1),
        "documents_per_cpu_s": rates,
        "times_the_floor": round(rates["floor"] / rates["pack"], 2),
    }
    return {"benchmark": "packing", "machine": machine(), "claims": [claim(row)], "rows": [row]}


def pack_files(source: Path, folder: Path) -> list[Path]:
    """Pack a file of documents into shards of a new folder, as a partition of the pack stage is packed."""
    folder.mkdir()
    paths: list[Path] = []
    with source.open("rb") as file:
        sequences = pack_batches(
            read_batches(file), CONTEXT, VOCABULARY, "vision-text", key_prefix="books-train-00000-"
        )
        for first in sequences:
            paths.append(folder / f"{len(paths):05d}.tar")
            with paths[-1].open("wb") as shard:
                rest = itertools.islice(sequences, PER_SHARD - 1)
                write_shard(shard, itertools.chain([first], rest), VOCABULARY)
    return paths


def floor(shards: list[bytes], source: Path, folder: Path) -> None:
    """Read the same columns; hash and write the same bytes."""
    folder.mkdir()
    with source.open("rb") as file:
        for _ in read_batches(file):
            pass
    for number, body in enumerate(shards):
        digest = hashlib.sha256()
        with (folder / f"{number:05d}.tar").open("wb") as shard:
            step = -(-len(body) // PER_SHARD)
            for start in range(0, len(body), step):
                part = body[start : start + step]
                digest.update(part)
                crc32(part)
                shard.write(part)


def _cpu_seconds(way: Callable[[Path, Path], object], source: Path, folder: Path) -> float:
    started = time.process_time()
    way(source, folder)
    return time.process_time() - started


def claim(row: dict) -> dict:
    """The target in documents, which a machine that hashes or writes slowly misses, or else the share of the floor."""
    measured, over = row["documents_per_cpu_s"]["pack"], row["times_the_floor"]
    return {
        "claim": f"documents packed to shards per CPU second at least, or within {OVER_FLOOR} times the floor",
        "where": f"{MEAN_TOKENS} tokens, context {CONTEXT}; {over} times the floor",
        "target": TARGET,
        "measured": measured,
        "met": measured >= TARGET or over <= OVER_FLOOR,
    }
