"""The benchmark of the loader's index, on few shards: memory of all processes, and the targets."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.corpus.loader_index import _entries, claims, loader_index_report


@pytest.mark.slow
def test_a_small_report_says_what_was_opened() -> None:
    report = loader_index_report(shards=16, per_shard=512, processes=2)
    (row,) = report["rows"]
    assert row["sequences"] == 16 * 512
    assert 24 < row["bytes_a_sequence"] < 26
    assert row["megabytes_of_all_when_every_page_is_touched"] > 0
    assert [claim["target"] for claim in report["claims"]] == [400, 5.0]


def test_sequences_follow_each_other_in_a_shard() -> None:
    entries = _entries(0, 50)
    ends = entries["offset"] + entries["length"] + entries["json_length"]
    assert (entries["offset"] % 512 == 0).all()
    assert (ends[:-1] < entries["offset"][1:]).all()
    assert (np.diff(entries["offset"]) - entries["length"][:-1] - entries["json_length"][:-1] < 4 * 512).all()


def test_memory_counts_when_all_pages_are_touched_and_time_for_the_slowest() -> None:
    row = {"shards": 1, "sequences": 2, "processes": 3, "seconds_to_open": 5.1}
    found = claims(row | {"megabytes_of_all_when_every_page_is_touched": 400})
    assert [claim["met"] for claim in found] == [True, False]
