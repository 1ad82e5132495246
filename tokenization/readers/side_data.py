"""Captions, questions and answers that stand in tables beside media, joined to the media objects by key.

In: the records of such tables. Out: the fields of an object, by its URL or key.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from storage.errors import BadData, UserError
from storage.public_url import path_of
from tokenization.readers.record import BadRecord, NotText, Record

KEYS = ("key", "file")
"""The columns of side data that may name its object, the first that does counts."""


_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=asdict).encode


def _key(value: Any) -> str:
    if isinstance(value, NotText):
        return value.shown or ""
    return "" if value is None else str(value)


def row_json(fields: Mapping[str, Any]) -> str | None:
    """A row as JSON, the same for equal rows; None where it has no fields."""
    return _JSON(fields) if fields else None


def _unreadable_named(url: str, records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    try:
        yield from records
    except BadData as error:
        raise UserError(f"{url}: no side data can be read from it ({error}); mend the file, or take it out") from None


@dataclass(frozen=True)
class SideData:
    """Fields of media objects that come from separate files, by key.

    A row's key is in its `key` or `file` column: a URL, a path or its end (`clips/bikes.mp4`), a file name, or any of
    these without extension. rows: their other fields as JSON, as a listing holds them, at a third of the memory. bad:
    rows that could not be used, each with the URL of its file.
    """

    rows: Mapping[str, str | None] = field(default_factory=dict)
    bad: tuple[tuple[str, BadRecord], ...] = ()

    @classmethod
    def load(cls, files: Iterable[tuple[str, Iterable[Record | BadRecord]]]) -> SideData:
        """Join the records of files, each with the URL of its file.

        Raises UserError on a row without a key, on a repeated key, and on an unreadable file.
        """
        rows: dict[str, str | None] = {}
        bad: list[tuple[str, BadRecord]] = []
        for url, records in files:
            for record in _unreadable_named(url, records):
                if isinstance(record, BadRecord):
                    bad.append((url, record))
                    continue
                index, fields = record
                column = next((name for name in KEYS if _key(fields.get(name))), None)
                if column is None:
                    raise UserError(f"{url}: row {index} has no key; give every row a `key` or a `file` column")
                key = _key(fields.pop(column))
                if key in rows:
                    raise UserError(f'{url}: row {index} repeats the key "{key}"; keep one row for each object')
                rows[key] = row_json(fields)
        return cls(rows, tuple(bad))

    def row(self, url_or_key: str) -> str | None:
        """The row of an object as JSON, without its key column; None if it has none. The longest matching key wins."""
        whole = path_of(url_or_key)
        if whole != url_or_key:
            for name in (url_or_key, posixpath.splitext(url_or_key)[0]):
                if name in self.rows:
                    return self.rows[name]
        start, end = 0, len(posixpath.splitext(whole)[0])
        for slashes in range(whole.count("/"), -1, -1):  # the whole path, then what follows each `/`
            if slashes in self._slashes:
                for name in (whole[start:], whole[start:end]):
                    if name in self.rows:
                        return self.rows[name]
            start = whole.find("/", start) + 1
        return None

    @cached_property
    def _slashes(self) -> frozenset[int]:
        """How many `/` keys have: next to all have as many, and are not looked for elsewhere."""
        return frozenset(key.count("/") for key in self.rows)

    def __len__(self) -> int:
        return len(self.rows)
