"""Captions, questions and answers that stand in tables beside media, joined to the media objects by key.

In: the records of such tables. Out: the fields of an object, by its URL or key.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import BadData, UserError
from storage.public_url import path_of
from tokenization.readers.record import BadRecord, NotText, Record

KEYS = ("key", "file")
"""The columns of side data that may name its object, the first that does counts."""


def _key(value: Any) -> str:
    if isinstance(value, NotText):
        return value.shown or ""
    return "" if value is None else str(value)


def _unreadable_named(url: str, records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    try:
        yield from records
    except BadData as error:
        raise UserError(f"{url}: no side data can be read from it ({error}); mend the file, or take it out") from None


@dataclass(frozen=True)
class SideData:
    """Fields of media objects that come from separate files, by key.

    A row's key is in its `key` or `file` column: a URL, a path or its end (`clips/bikes.mp4`), a file name, or any of
    these without extension. bad: rows that could not be used, each with the URL of its file.
    """

    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    bad: tuple[tuple[str, BadRecord], ...] = ()

    @classmethod
    def load(cls, files: Iterable[tuple[str, Iterable[Record | BadRecord]]]) -> SideData:
        """Join the records of files, each with the URL of its file.

        Raises UserError on a row without a key, on a repeated key, and on an unreadable file.
        """
        rows: dict[str, dict[str, Any]] = {}
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
                rows[key] = fields
        return cls(rows, tuple(bad))

    def get(self, url_or_key: str) -> dict[str, Any]:
        """The row of an object, without its key column; empty if there is none. The longest matching key wins."""
        whole = path_of(url_or_key)
        parts = whole.split("/")
        for name in (url_or_key, whole, *("/".join(parts[start:]) for start in range(1, len(parts)))):
            for key in (name, posixpath.splitext(name)[0]):
                if key in self.rows:
                    return dict(self.rows[key])
        return {}

    def __len__(self) -> int:
        return len(self.rows)
