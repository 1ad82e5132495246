"""Rows of figures as a table of text."""

from __future__ import annotations

from pipelines.evaluate.plain_table import plain_table, table_lines


def test_a_table_has_the_columns_that_fit_a_line() -> None:
    rows = [
        {"task": "a", "share": 1 / 3, "depths": [0.0, None, 1.0], "answers": [{"city": "Oslo"}], "count": 7},
        {"task": "a long name", "share": None, "depths": [], "answers": [], "late": True},
    ]
    columns, fields = plain_table(rows)
    assert columns == ["task", "share", "depths", "count", "late"]
    assert fields[0] == ["a", "0.333", "0.000 - 1.000", "7", "-"]
    assert table_lines(rows) == [
        "task         share  depths         count  late",
        "a            0.333  0.000 - 1.000  7      -",
        "a long name  -                     -      True",
    ]
    assert table_lines([]) == [""]


def test_a_long_text_is_cut_and_a_long_list_left_out() -> None:
    columns, fields = plain_table([{"text": "x" * 90, "list": list(range(90))}])
    assert columns == ["text"]
    assert fields == [["x" * 37 + "..."]]
