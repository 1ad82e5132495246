"""Text on S3 to written documents, the whole of a partition: megabytes of text per CPU second, beside a plain loop.

In: the plays as records of about 24 KB, and as records of about 240 bytes with one text field or with a prompt and an
answer, each as JSONL and as Parquet on a real S3 server. Out: a row a file, and the targets. Two systems:

    ringworld   what a task of the tokenize stage does with a partition, without Ray: reading, parsing in a confined
                process, encoding, documents with lineage, Parquet in the output folder, its hash and its record.
    plain       a loop without processes, checks or lineage: read, `json.loads` (or pyarrow for Parquet), `tokenizers`,
                BOS and EOS, Parquet of the ids by pyarrow.

A measurement runs in a process of its own, which has done the same for a file of one record before the clock starts:
imports, connections and compiling are over, and every word is new. Seconds are CPU time of the process, its threads and
its children; the fastest round counts. Both must write the same ids.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, normalizers

from benchmarks.machine import machine
from benchmarks.text import plays
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.tokenize_task import tokenize as tokenize_partition
from pipelines.tokenize.vocabulary import joint_vocabulary
from storage.store import Store
from storage.urls import open_url
from testing.s3_server import ObjectStore, object_store
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer

TARGETS = {"plays": 25.0, "short": 12.0}
"""Megabytes (10^6 bytes of UTF-8) of text per CPU second, by corpus."""
FORMATS = ("jsonl", "parquet")
SHORT_BYTES = 240
PROMPT_BYTES = 80

Row = dict[str, str]


def _acts() -> Iterator[Row]:
    return ({"text": act} for act in plays() if act)


def _short() -> Iterator[Row]:
    """The plays' lines, joined to records of about `SHORT_BYTES`."""
    held: list[str] = []
    size = 0
    for act in plays():
        for line in act.split("\n"):
            held.append(line)
            size += len(line.encode()) + 1
            if size >= SHORT_BYTES - 20:  # half a line
                yield {"text": "\n".join(held)}
                held, size = [], 0


def _pairs() -> Iterator[Row]:
    return ({"prompt": row["text"][:PROMPT_BYTES], "answer": row["text"][PROMPT_BYTES:]} for row in _short())


CORPORA: dict[str, tuple[Callable[[], Iterator[Row]], str]] = {
    "plays": (_acts, "text"),
    "short": (_short, "text"),
    "pairs": (_pairs, "[prompt],answer"),
}
"""By name the records, and the field spec that makes documents of them."""


@dataclass(frozen=True)
class Job:
    """One file to tokenize. url: of the object. spec: its field spec."""

    url: str
    spec: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One run. seconds: of CPU. size: bytes written. digest: of all documents' ids."""

    seconds: float
    documents: int
    tokens: int
    size: int
    digest: str


def text_figures(rounds: int = 5, corpora: Sequence[str] = tuple(CORPORA)) -> dict[str, Any]:
    """All files by both systems, by turns. Raises ValueError where the two write different ids."""
    with object_store() as store:
        rows = [_row(store, name, form, rounds) for name in corpora for form in FORMATS]
    return {
        "benchmark": "corpus/text",
        "settings": {"rounds": rounds, "short_bytes": SHORT_BYTES, "prompt_bytes": PROMPT_BYTES},
        "machine": {**machine(), **{name: version(name) for name in ("pyarrow", "tokenizers")}},
        "rows": rows,
        "claims": claims(rows),
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target at the slower of its corpus's files."""
    made = []
    for name, target in TARGETS.items():
        figures = {f"{row['corpus']}.{row['format']}": row["ringworld"] for row in rows if row["corpus"] == name}
        if not figures:
            continue
        worst = min(figures, key=figures.__getitem__)
        made.append(
            {
                "claim": f"{name} on S3 to written documents: MB of text per CPU second at least",
                "where": worst,
                "target": target,
                "measured": figures[worst],
                "met": figures[worst] >= target,
            }
        )
    return made


def _row(store: ObjectStore, name: str, form: str, rounds: int) -> dict[str, Any]:
    make, spec = CORPORA[name]
    rows = list(make())
    size = sum(len(text.encode()) for row in rows for text in row.values()) / 1e6
    whole, first = (Job(f"{store.url}/{name}-{part}.{form}", spec, store.options) for part in ("whole", "first"))
    store.fs.pipe_file(whole.url, _in_format(rows, form))
    store.fs.pipe_file(first.url, _in_format([dict.fromkeys(rows[0], "a")], form))
    found: dict[str, list[Measured]] = {system: [] for system in _SYSTEMS}
    for _ in range(rounds):
        for system in _SYSTEMS:
            found[system].append(_measure_apart(system, first, whole))
    if len({(run.digest, run.documents) for runs in found.values() for run in runs}) > 1:
        raise ValueError(f"the systems write different documents of {whole.url}")
    return {
        "corpus": name,
        "format": form,
        "documents": len(rows),
        "tokens": found["ringworld"][0].tokens,
        "megabytes": round(size, 3),
        "written_megabytes": {system: round(runs[0].size / 1e6, 3) for system, runs in found.items()},
        **{system: round(size / min(run.seconds for run in runs), 2) for system, runs in found.items()},
    }


def _in_format(rows: Sequence[Row], form: str) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=1 << 12)
    return file.getvalue()


# --- The two systems: each writes documents of a file to a folder and returns the files that hold them ---


def _ringworld(job: Job, folder: str) -> list[str]:
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "storage": {"root": folder, "options": job.options},
            "sources": {"text": {"urls": [job.url], "fields": [job.spec]}},
            "train": {"stages": [{**_UNUSED_STAGE, "mixture": {"text": 1}}]},
        }
    )
    tokenize = TokenizeJob(recipe, joint_vocabulary(recipe), 0)
    store = Store(folder)
    names = []
    settings: dict[str, dict[str, Any]] = {name: {} for name in recipe.sources}
    for part in Partitions(list_sources(recipe), recipe.tokenize.partition_bytes, settings).values():
        record = tokenize_partition(part, tokenize, None, store)
        assert isinstance(record, dict)
        assert not record["quarantine"]
        names.append(store.path(record["file"]))
    return names


_UNUSED_STAGE = {
    "name": "text",
    "context": 1024,
    "rope_theta": 1e4,
    "steps": 1,
    "batch_tokens": 1024,
    "lr": 1e-3,
    "objective": "text",
}


def _plain(job: Job, folder: str) -> list[str]:
    ours = load_text_tokenizer()
    names = [name.strip("[]") for name in job.spec.split(",")]
    encode = _plain_encode(ours)
    tokens = []
    for row in _plain_rows(job, names):
        ids = [ours.bos_id]
        for name in names:
            ids += encode(row[name])
        tokens.append([*ids, ours.eos_id])
    path = f"{folder}/plain.parquet"
    kind = pa.list_(pa.int32())
    pq.write_table(pa.table({"tokens": pa.array(tokens, kind)}), path, compression="zstd", row_group_size=1 << 14)
    return [path]


def _plain_rows(job: Job, names: Sequence[str]) -> Iterator[Row]:
    with open_url(job.url, job.options) as file:
        if job.url.endswith(".jsonl"):
            for line in io.BufferedReader(file, 1 << 20):  # type: ignore[type-var]  # fsspec's own lines are slow
                yield json.loads(line)
        else:
            for batch in pq.ParquetFile(file).iter_batches(columns=list(names), use_threads=False):
                yield from batch.to_pylist()


def _plain_encode(ours: TextTokenizer) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_str(ours._tokenizer.to_str())  # the same merges, as `tokenizers` has them
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return lambda text: list(tokenizer.encode(text).ids)


_SYSTEMS: dict[str, Callable[[Job, str], list[str]]] = {"ringworld": _ringworld, "plain": _plain}


# --- The clock ---


def _measure_apart(system: str, first: Job, whole: Job) -> Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, system, first, whole).result()


def _measure(system: str, first: Job, whole: Job) -> Measured:
    run = _SYSTEMS[system]
    with tempfile.TemporaryDirectory() as folder:
        run(first, folder)
    with tempfile.TemporaryDirectory() as folder:
        started = _cpu_seconds()
        files = run(whole, folder)
        seconds = _cpu_seconds() - started
        tables = [pq.read_table(file, columns=["tokens"]).column("tokens") for file in files]
        size = sum(Path(file).stat().st_size for file in files)
    tokens = pa.chunked_array([chunk for table in tables for chunk in table.chunks])
    flat = tokens.combine_chunks().flatten().to_numpy()
    return Measured(seconds, len(tokens), len(flat), size, hashlib.sha256(flat.tobytes()).hexdigest())


def _cpu_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    of_children = ended.ru_utime + ended.ru_stime + sum(times.user + times.system for times in running)
    return time.process_time() + of_children
