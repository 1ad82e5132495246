"""Samples drawn while training, as the report shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.report.samples import last_samples
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.text.tokenizer import load_text_tokenizer


def measured(step: int, sample: list[int]) -> dict[str, Any]:
    given = {"prompt": load_text_tokenizer().encode("the sea").tolist(), "document": [VOCABULARY.eos_id]}
    return {"step": step, "samples": [{"source": "books", "sample": sample, **given}]}


def test_the_last_ones_of_each_stage_are_text_and_counts_of_other_tokens(tmp_path: Path) -> None:
    frame = [VOCABULARY.text_size + 3, VOCABULARY.text_size + 9, VOCABULARY.eov_id]
    calm = load_text_tokenizer().encode("was calm").tolist()
    training = [
        {"stage": "text", "heldout": [measured(1, [5]), measured(3, [*calm, *frame]), {"step": 4}]},
        {"stage": "video", "heldout": []},
    ]
    (row,) = last_samples(tiny_recipe(tmp_path), training)
    assert (row["stage"], row["step"], row["source"], row["prompt"]) == ("text", 3, "books", "the sea")
    assert row["sample"] == "was calm [3 vision tokens]"
    assert last_samples(tiny_recipe(tmp_path), training[1:]) == []
