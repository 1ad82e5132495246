"""Rows of figures as a table of text, for terminals and for the report's tables that have no plot of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

_LONGEST = 40  # numbers of a list, or characters of a text, that a field of the table shows


def plain_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and the fields of each row: of what holds a number, a text or a short list of numbers."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if all(_is_plain(row.get(name)) for row in rows)]
    return columns, [[_field(row.get(name)) for name in columns] for row in rows]


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same as aligned lines, the names first."""
    columns, fields = plain_table(rows)
    widths = [max(map(len, column)) for column in zip(columns, *fields)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (columns, *fields)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST and all(one is None or isinstance(one, Real) for one in value)
    return value is None or isinstance(value, str | Real)


def _field(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_field, value))
    if isinstance(value, float):
        return f"{value:.3f}"
    text = "-" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
