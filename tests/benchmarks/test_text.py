"""The text benchmark: what it encodes, and that all who encode it agree."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.text import CORPORA, claims, corpus, in_format, measure, text_report
from storage.errors import UserError


def test_a_corpus_is_cut_at_its_size_and_has_no_empty_text() -> None:
    for name in CORPORA:
        texts = corpus(name, 0.2)
        assert all(texts)
        assert sum(len(text.encode()) for text in texts[:-1]) <= 200_000
    with pytest.raises(UserError, match="only plays, lines, code"):
        corpus("novels", 1)


def test_both_formats_hold_the_same_texts() -> None:
    texts = ["a\nb", "\u00e9"]
    assert in_format(texts, "jsonl").decode() == '{"text": "a\\nb"}\n{"text": "\u00e9"}\n'
    assert pq.read_table(io.BytesIO(in_format(texts, "parquet")))["text"].to_pylist() == texts


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_all_systems_give_the_same_ids(tmp_path: Path, form: str) -> None:
    texts = ["To be, or not to be:\n  that is the question.", "caf\u00e9 \u4e2d\u6587  \U0001f600"]
    (tmp_path / f"two.{form}").write_bytes(in_format(texts, form))
    (tmp_path / f"one-letter.{form}").write_bytes(in_format(["a"], form))
    systems = ("ringworld", "ringworld_written", "tokenizers", "sentencepiece")
    made = [measure(system, str(tmp_path / f"two.{form}"), {}) for system in systems]
    assert len({run.digest for run in made}) == 1
    assert made[0].n_ids > 20
    assert all(run.n_ids == made[0].n_ids for run in made)
    assert measure("parse", str(tmp_path / f"two.{form}"), {}).n_ids == 0


def test_the_target_is_decided_by_the_slowest_file_of_texts() -> None:
    rows = [
        {"corpus": name, "format": "jsonl", "mb_per_cpu_s": {"ringworld": figure}}
        for name, figure in (("plays", 30.0), ("code", 24.0), ("lines", 1.0))
    ]
    (claim,) = claims(rows)
    assert (claim["where"], claim["measured"], claim["met"]) == ("code.jsonl", 24.0, False)
    assert claims([]) == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_report_from_a_real_server() -> None:
    report = text_report(["plays"], 0.2, 1, ["ringworld", "read"])
    assert [(row["corpus"], row["format"]) for row in report["rows"]] == [("plays", "jsonl"), ("plays", "parquet")]
    assert all(figure > 0 for row in report["rows"] for figure in row["mb_per_cpu_s"].values())
