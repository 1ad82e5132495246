"""Text that is broken, hostile or merely unusual, each with what becomes of it: none costs another, crashes, hangs or
takes memory without bound.

The first test looks at each through the door that the tokenize stage uses, the second at the largest of them in a
process of its own, by the peak of its memory.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.records import Tally, TokenizeJob
from pipelines.tokenize.text_documents import text_documents
from testing.miniature import ROOT, environment
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.readers import records
from tokenization.text.tokenizer import load_text_tokenizer

MB = 1_000_000
LIMIT = records.MAX_RECORD_BYTES


def parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


@cache
def rows() -> bytes:
    return parquet(pa.table({"text": [f"row {number}" for number in range(1000)]}))


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def untyped(values: list[bytes]) -> pa.Table:
    """Strings as any writer may leave them: nobody has looked whether they are UTF-8."""
    return pa.table({"text": pa.array(values).view(pa.string())})


def nested(depth: int) -> bytes:
    return b'{"text": "fine", "more": ' + b"[" * depth + b"]" * depth + b"}"


GOOD = b'{"text": "good"}\n'
Reasons = list[tuple[int | None, str]]
"""Of each quarantine line its record and how its reason begins."""

CASES: dict[str, tuple[Callable[[], bytes], int, Reasons]] = {
    # name: content, how many documents come of it, what is put in quarantine
    "latin-1.txt": (lambda: b"caf\xe9 au lait", 0, [(None, "not UTF-8: byte 0xe9 at offset 3")]),
    "cut.md": (lambda: "caf\u00e9".encode()[:-1], 0, [(None, "not UTF-8: byte 0xc3 at offset 3")]),
    "overlong.txt": (lambda: b"a\xc0\xafb", 0, [(None, "not UTF-8: byte 0xc0 at offset 1")]),
    "utf-16.txt": (lambda: "To be".encode("utf-16-le"), 0, [(None, "not text: a NUL byte at offset 1")]),
    "marked-utf-16.txt": (lambda: "To be".encode("utf-16"), 0, [(None, "not UTF-8: byte 0xff at offset 0")]),
    "nul.txt": (lambda: b"To be\0or not", 0, [(None, "not text: a NUL byte at offset 5")]),
    "empty.txt": (lambda: b"", 0, [(0, "the text is empty")]),
    "blank.txt": (lambda: b" \n\t\xc2\xa0", 0, [(0, "the text is empty")]),
    "empty-beside-others.jsonl": (
        lambda: GOOD + b'{"text": "", "id": 1}\n{"text": "  ", "id": 2}\n' + GOOD,
        2,
        [(1, "the text is empty"), (2, "the text is empty")],
    ),
    "mark-alone.txt": (lambda: b"\xef\xbb\xbf", 0, [(0, "the text is empty")]),
    "noise.txt": (lambda: noise(MB), 0, [(None, "not UTF-8")]),
    "one-line.txt": (lambda: b"to be " * 17_000_000, 0, [(None, f"the file is larger than {LIMIT} bytes")]),
    "no-boundary.txt": (lambda: b"a" * (2 << 20), 0, [(0, "2097153 characters in a row without a word boundary")]),
    "latin-1.jsonl": (lambda: GOOD + b'{"text": "caf\xe9"}\n' + GOOD, 2, [(1, "line 2: not UTF-8: byte 0xe9")]),
    "surrogate.jsonl": (
        lambda: GOOD + b'{"text": "a\\ud800b"}\n' + GOOD,
        2,
        [(1, "the text holds a lone surrogate at character 1")],
    ),
    "nul.jsonl": (lambda: GOOD + b'{"text": "a\0b"}\n' + GOOD, 2, [(1, "line 2: not text: a NUL byte")]),
    "escaped-nul.jsonl": (lambda: b'{"text": "a\\u0000b"}\n', 1, []),  # a character like others, and so encoded
    "empty.jsonl": (lambda: b"", 0, [(0, "the file is empty")]),
    "twice.jsonl": (lambda: GOOD + b'{"text": "a", "text": "b"}\n', 1, [(1, 'line 2: the key "text" occurs twice')]),
    "other.jsonl": (
        lambda: b'{"caption": "a"}\n{"text": 3}\n{"text": null}\n',
        0,
        [
            (0, 'the record lacks the field "text"'),
            (1, 'the record holds int, not text, in the field "text"'),
            (2, 'the record holds NoneType, not text, in the field "text"'),
        ],
    ),
    "deep.jsonl": (lambda: GOOD + nested(10_000) + b"\n" + GOOD, 2, [(1, "line 2: broken JSON (maximum recursion")]),
    "deep-and-open.jsonl": (lambda: GOOD + b"[" * MB + b"\n", 1, [(1, "line 2: broken JSON (maximum recursion")]),
    "long-number.jsonl": (lambda: b'{"text": "a", "n": ' + b"9" * MB + b"}\n", 0, [(0, "line 1: broken JSON")]),
    "one-line.jsonl": (
        lambda: GOOD + b'{"text": "' + b"to be " * 17_000_000 + b'"}\n' + GOOD,
        2,
        [(1, f"line 2: longer than {LIMIT} bytes, the most for one record")],
    ),
    "noise.jsonl": (
        lambda: noise(20 * MB),
        0,
        [(None, "101 of its first 101 lines are bad, the last because of line")],
    ),
    "mostly-noise.jsonl": (
        lambda: GOOD * 3 + noise(20 * MB),
        3,
        [(number, f"line {number + 1}: ") for number in range(3, 103)] + [(None, "101 of its first 104 lines are bad")],
    ),
    "empty.parquet": (lambda: b"", 0, [(None, "not a whole Parquet file")]),
    "noise.parquet": (lambda: noise(MB), 0, [(None, "not a whole Parquet file")]),
    "truncated.parquet": (lambda: rows()[:-20], 0, [(None, "not a whole Parquet file")]),
    "half.parquet": (lambda: rows()[: len(rows()) // 2], 0, [(None, "not a whole Parquet file")]),
    "other-magic.parquet": (lambda: rows()[:-4] + b"PARE", 0, [(None, "not a whole Parquet file")]),
    "long-footer.parquet": (
        lambda: rows()[:-8] + (1 << 31).to_bytes(4, "little") + b"PAR1",
        0,
        [(None, "not a whole Parquet file")],
    ),
    "latin-1.parquet": (
        lambda: parquet(untyped([b"good", b"caf\xe9", b"good"])),
        2,
        [(1, 'row 1: the column "text" is not UTF-8: byte 0xe9 at offset 3')],
    ),
    "twice.parquet": (
        lambda: parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])),
        0,
        [(None, 'the column "text" occurs twice')],
    ),
    "long-row.parquet": (
        lambda: parquet(pa.table({"text": ["good", "to be " * 12_000_000, "good"]}), compression="zstd"),
        2,
        [(1, f"row 1: larger than {LIMIT} bytes")],
    ),
    # Bombs: what is stored comes to thousands of times as much.
    "zeros.parquet": (
        lambda: parquet(pa.table({"text": ["0" * MB] * 400}), compression="zstd", use_dictionary=False),
        0,
        [(0, "rows 0 to 399 are unreadable (400")],
    ),
    "dictionary.parquet": (
        lambda: parquet(
            pa.table({"text": pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), ["x " * (20 * MB)])}),
            compression="zstd",
            dictionary_pagesize_limit=1 << 30,
        ),
        3,
        [(3, "rows 3 to 2999 are unreadable (they expand to many times their stored bytes)")],
    ),
    "lists.parquet": (
        lambda: parquet(pa.table({"text": [np.zeros(100 * MB, np.int8)]}), compression="zstd"),
        0,
        [(0, "rows 0 to 0 are unreadable (400")],
    ),
}
LARGE = ("one-line.txt", "one-line.jsonl", "long-row.parquet", "dictionary.parquet", "lists.parquet", "zeros.parquet")


def outcome(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """How many documents the tokenize stage makes of a file, and its quarantine."""
    recipe = tiny_recipe(path.parent)
    source = recipe.sources["books"].model_copy(update={"urls": [str(path)], "heldout": []})
    recipe = recipe.model_copy(update={"sources": {"books": source}})
    (found,) = list_sources(recipe)
    job, tally = TokenizeJob(recipe, VOCABULARY, 16), Tally()
    made = sum(map(len, text_documents(found, job, load_text_tokenizer(), tally)))
    assert made == tally.documents
    return made, tally.quarantine


@pytest.mark.parametrize("name", [name for name in CASES if name not in LARGE])
def test_what_becomes_of_a_file(name: str, tmp_path: Path) -> None:
    content, documents, reasons = CASES[name]
    (tmp_path / name).write_bytes(content())
    made, quarantine = outcome(tmp_path / name)
    assert made == documents
    assert [line["record"] for line in quarantine] == [record for record, _ in reasons]
    for line, (_, reason) in zip(quarantine, reasons):
        assert line["reason"].startswith(reason)
        assert len(line["reason"]) < 400
        assert line["url"].endswith(name)


MEMORY = 900 * MB
"""Of the process that uses the records, past what it imports: one of 64 MB with its copies and ids, or many at once."""

MEASURED = """
import json, sys, threading
from pathlib import Path
from tests.pipelines.tokenize.test_bad_text import outcome

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

small = Path(sys.argv[1]) / "small.jsonl"
small.write_text(json.dumps({"text": "To be"}))
outcome(small)
for path in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    made, quarantine = outcome(Path(path))
    print(json.dumps([made, quarantine, resident("VmHWM") - before]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.faults
def test_what_large_ones_take_of_memory(tmp_path: Path) -> None:
    """Also a record that is just within the limit, of characters that take a byte in the file and four in memory."""
    paths = []
    for name in LARGE:
        paths.append(tmp_path / name)
        paths[-1].write_bytes(CASES[name][0]())
    whole = "\U0001f600" + " to be" * ((LIMIT - 100) // 6)
    paths.append(tmp_path / "whole.jsonl")
    paths[-1].write_text(json.dumps({"text": whole}, ensure_ascii=False))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), *map(str, paths)],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for path, (made, quarantine, _) in zip(paths, found):
        _, documents, reasons = CASES.get(path.name, (None, 1, []))
        assert made == documents, path.name
        assert [line["record"] for line in quarantine] == [record for record, _ in reasons], path.name
        for line, (_, reason) in zip(quarantine, reasons):
            assert line["reason"].startswith(reason)
    grown = {path.name: peak for path, (_, _, peak) in zip(paths, found)}
    assert max(grown.values()) < MEMORY, grown
