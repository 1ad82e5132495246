"""The benchmark of packing: both ways over the same documents, and the target in one of two forms."""

from __future__ import annotations

import pytest

from benchmarks.corpus.packing import CONTEXT, claim, documents, packing_report


def test_a_small_report_says_what_was_packed() -> None:
    report = packing_report(600, rounds=1)
    (row,), (found,) = report["rows"], report["claims"]
    assert row["documents"] == 600
    assert row["shards"] == 1
    assert row["megabytes_of_shards"] > 600 * 330 * 8 / 1e6
    assert found["measured"] == row["documents_per_cpu_s"]["pack"] > 0


def test_documents_are_as_long_on_average_as_the_benchmark_says() -> None:
    lengths = [len(document) for document in documents(3000)]
    assert sum(lengths) / len(lengths) == pytest.approx(330, rel=0.03)
    assert max(lengths) <= CONTEXT


@pytest.mark.parametrize(
    ("rate", "over", "is_met"), [(200_000, 3.0, True), (90_000, 1.5, True), (199_999, 1.51, False)]
)
def test_the_target_is_met_by_its_number_or_near_the_floor(rate: int, over: float, is_met: bool) -> None:
    assert claim({"documents_per_cpu_s": {"pack": rate}, "times_the_floor": over})["met"] is is_met
