"""Texts that stay in columns become the documents that they become record by record, and the same quarantine."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.records import Tally, TokenizeJob, text_records, to_documents
from pipelines.tokenize.text_documents import text_documents
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.shards.document_parquet import SCHEMA, to_batches
from tokenization.text.tokenizer import load_text_tokenizer

TEXTS: list[dict[str, Any]] = [
    {"prompt": "Who's there?", "answer": "Nay, answer me."},
    {"prompt": "", "answer": "A caf\u00e9, a \u8a9e and a \U0001f600."},
    {"prompt": "and no answer", "answer": ""},
    {"prompt": "a blank one", "answer": " \t\u2003"},
    {"prompt": "marks \u2581 and <s> </s>", "answer": " twice  spaced ", "more": [1, {"a": None}]},
    {"prompt": 'a "quoted" \\ \n line', "answer": "x" * 300},
]
AWKWARD: list[dict[str, Any]] = [
    {"prompt": "lacks the other"},
    {"prompt": None, "answer": "null"},
    {"prompt": 3, "answer": "a number"},
    {"prompt": "a list", "answer": ["of", "texts"]},
    {"prompt": "a surrogate", "answer": "a\ud800b"},
    {"prompt": "too long", "answer": "a" * (1 << 20) + "a"},
    {},
]
SPECS = [
    ["answer"],
    ["[prompt],answer"],
    ["prompt+answer,[<|eos|>],prompt"],
    ["[prompt],answer", "answer", "[answer],prompt", "prompt", "prompt"],
]


def json_lines() -> bytes:
    lines = [json.dumps(record) for record in (TEXTS[:3] + AWKWARD + TEXTS[3:]) * 2]
    broken = ["", "{", '"text"', '{"prompt": "a", "prompt": "b"}', '{"answer": NaN}', '{"answer": "\0"}']
    return ("\n".join([*lines, *broken, *lines[:4]]) + "\n").encode() + b'{"answer": "\xff"}\n'


def many_lines() -> bytes:
    lines = [json.dumps({"prompt": f"line {number}", "answer": "a word " * (number % 5)}) for number in range(2500)]
    return "\n".join(lines).encode()


def csv() -> bytes:
    return b'prompt,answer,more\r\n"a, b","two\nlines",1\r\nshort,row\r\n,only an answer,\r\nno answer,,2\r\n'


def parquet() -> bytes:
    file = io.BytesIO()
    columns = {name: [str(row.get(name)) for row in TEXTS] + [None, "after a null"] for name in ("prompt", "answer")}
    pq.write_table(pa.table({**columns, "n": list(range(len(TEXTS) + 2))}), file, row_group_size=3)
    return file.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "records.jsonl": json_lines,
    "many.jsonl": many_lines,
    "records.jsonl.gz": lambda: gzip.compress(json_lines()),
    "records.csv": csv,
    "records.parquet": parquet,
    "cut.parquet": lambda: parquet()[:-9],
    "empty.jsonl": bytes,
}


def listed(path: Path, specs: list[str]) -> tuple[SourceObject, TokenizeJob]:
    tree = tiny_recipe(path.parent).model_dump(mode="json")
    tree["sources"]["books"] |= {"urls": [str(path)], "fields": specs, "heldout": []}
    recipe = Recipe.model_validate(tree)
    (found,) = list_sources(recipe.model_copy(update={"sources": {"books": recipe.sources["books"]}}))
    return found, TokenizeJob(recipe, VOCABULARY, 16)


@pytest.mark.parametrize("specs", SPECS, ids=" or ".join)
@pytest.mark.parametrize("name", FILES)
def test_documents_and_quarantine_are_those_of_the_records_one_by_one(
    name: str, specs: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    found, job = listed(tmp_path / name, specs)
    tokenizer, tally, expected = load_text_tokenizer(), Tally(), Tally()
    in_columns = pa.Table.from_batches(text_documents(found, job, tokenizer, tally), SCHEMA)
    one_by_one = list(to_batches(to_documents(text_records(found, job, expected), job, tokenizer, expected)))
    assert in_columns.to_pylist() == [row for batch in one_by_one for row in batch.to_pylist()]
    assert tally.quarantine == sorted(expected.quarantine, key=_line)
    assert (tally.units, tally.documents, tally.tokens) == (expected.units, expected.documents, expected.tokens)
    assert tally.documents or name in ("cut.parquet", "empty.jsonl")


def _line(entry: dict[str, Any]) -> float:
    """In the order of their lines, and last what is said of the whole file."""
    return float("inf") if entry["record"] is None else entry["record"]
