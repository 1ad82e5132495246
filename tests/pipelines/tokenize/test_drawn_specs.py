"""Of several field specs one is drawn for each record, of those that the record fits."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.recipe import Recipe
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.records import Record, Tally, TokenizeJob, to_documents
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.text.tokenizer import load_text_tokenizer

FOUND = SourceObject("clips/a.mp4", "clips", "/x/a.mp4", 1, "e", "video", False, {})
CODES = np.zeros((1, 4), np.int32)


def drawn(folder: Path, specs: list[str], records: list[dict[str, Any]]) -> tuple[dict[int, str], Tally]:
    """The spec of each record that became a document, by the record's number; and what became of the others."""
    tree = tiny_recipe(folder).model_dump(mode="json")
    tree["sources"]["clips"]["fields"] = specs
    job, tally = TokenizeJob(Recipe.model_validate(tree), VOCABULARY, 16), Tally()
    made = [Record(FOUND, FOUND.key, number, number, fields) for number, fields in enumerate(records)]
    documents = to_documents(made, job, load_text_tokenizer(), tally)
    return {document.provenance["record"]: document.provenance["fields"] for document in documents}, tally


def test_a_record_draws_among_the_specs_that_it_fits_and_none_is_bad_for_those_that_it_does_not(tmp_path: Path) -> None:
    specs = ["[caption],vision", "vision", "[vision],caption"]
    records: list[dict[str, Any]] = [{"vision": CODES} | ({"caption": "a"} if n % 2 else {}) for n in range(60)]
    found, tally = drawn(tmp_path, specs, records)
    assert not tally.quarantine
    assert {spec for number, spec in found.items() if number % 2} == set(specs)
    assert {spec for number, spec in found.items() if not number % 2} == {"vision"}
    blank, _ = drawn(tmp_path, specs, [{"vision": CODES, "caption": ""}] * 30)
    assert set(blank.values()) == {"[caption],vision", "vision"}, "an empty caption is nothing to learn"


def test_where_all_fit_the_draw_is_lwms_by_the_seed_and_the_records_key(tmp_path: Path) -> None:
    specs = ["vision", "vision", "[caption],vision", "[vision],caption"]
    found, _ = drawn(tmp_path, specs, [{"vision": CODES, "caption": "a"}] * 40)
    for number, spec in found.items():
        index = int.from_bytes(hashlib.sha256(f"3/clips/a.mp4#{number}".encode()).digest()[:8], "big")
        assert spec == random.Random(index).choice(specs)


def test_a_record_that_fits_none_is_bad_and_the_reason_says_what_each_lacks(tmp_path: Path) -> None:
    found, tally = drawn(tmp_path, ["[caption],vision", "vision,answer"], [{"vision": CODES, "answer": 3}])
    assert not found
    assert [entry["reason"] for entry in tally.quarantine] == [
        'none of its field specs fits: [caption],vision: the record lacks the field "caption"; '
        'vision,answer: the record holds int, not text, in the field "answer"'
    ]
    _, tally = drawn(tmp_path, ["[caption],vision"], [{"vision": CODES}])
    assert [entry["reason"] for entry in tally.quarantine] == ['the record lacks the field "caption"']
