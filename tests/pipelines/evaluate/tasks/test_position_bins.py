"""Windows of long text and bins of positions."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.tasks.position_bins import bin_edges, rows_of_bins, windows


@pytest.mark.parametrize(
    ("context", "edges"),
    [(2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9]), (33, [1, 2, 4, 8, 16, 32, 33])],
)
def test_bins_double_and_hold_every_position_with_a_target_once(context: int, edges: list[int]) -> None:
    assert bin_edges(context) == edges


def test_windows_are_of_one_document_each_and_begin_with_bos() -> None:
    documents = [np.arange(10, 17), np.arange(20, 23), np.arange(30, 40)]
    made = list(windows(documents, 5, 10, bos_id=1))
    assert [one.tolist() for one in made] == [
        [1, 10, 11, 12, 13],
        [1, 30, 31, 32, 33],
        [1, 34, 35, 36, 37],
    ]
    assert len(list(windows(documents, 5, 2, bos_id=1))) == 2
    assert [one.tolist() for one in windows([np.arange(4)], 5, 9, bos_id=1)] == [[1, 0, 1, 2, 3]]


def test_bins_without_targets_have_no_row() -> None:
    rows = rows_of_bins([1, 2, 4, 8], [3.0, 0.0, 8.0], [1, 0, 4])
    assert rows == [
        {"from": 1, "to": 1, "targets": 1, "nats_per_token": 3.0},
        {"from": 4, "to": 7, "targets": 4, "nats_per_token": 2.0},
    ]
