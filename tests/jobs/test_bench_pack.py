"""The packing benchmark: peers that pack by the same rule come to the same number of sequences."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.bench.pack import (
    claims,
    cut,
    mixed_lengths,
    next_fit,
    pack_report,
    rooms_best_fit,
    tree_best_fit,
    windowed_best_fit,
)
from tokenization.best_fit import best_fit
from tokenization.errors import UserError


def test_documents_are_drawn_from_the_mix_and_are_the_same_every_time() -> None:
    lengths = mixed_lengths(500)
    assert len(lengths) == 500
    assert lengths.min() > 256
    assert lengths.max() > 5_000
    np.testing.assert_array_equal(lengths, mixed_lengths(500))
    with pytest.raises(UserError, match="there is no mix"):
        mixed_lengths(10, "books")


def test_documents_over_the_context_are_cut_in_order() -> None:
    assert cut(np.array([5, 25, 10, 21, 1]), 10).tolist() == [5, 10, 10, 5, 10, 10, 10]


@pytest.mark.parametrize("context", [4096, 32_768, 100_000])
def test_peers_by_the_same_rule_need_as_many_sequences(context: int) -> None:
    lengths = cut(mixed_lengths(2_000), context)
    sequences = best_fit(lengths, context)[1]
    assert rooms_best_fit(lengths, context) == tree_best_fit(lengths, context) == sequences
    assert windowed_best_fit(lengths, context) == sequences  # one window
    assert next_fit(lengths, context) >= sequences


def test_a_report_has_its_targets() -> None:
    report = pack_report([4096, 32_768], 1_000, 1)
    assert [row["context"] for row in report["rows"]] == [4096, 32_768]
    assert [claim["claim"] for claim in report["claims"]] == [
        "documents packed per CPU second at least",
        "fill at least",
    ]
    assert all(0 < figures["fill"] <= 1 for row in report["rows"] for figures in row["packers"].values())
    assert claims([]) == []
