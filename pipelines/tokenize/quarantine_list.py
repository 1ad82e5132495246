"""Every bad object and record of a stage, of which a corpus of billions may have millions: none stays in memory.

In: the entries of each partition, in any order of partitions. Out: the first of them, in the order of partitions, which
the manifest lists; and all of them as a Parquet file, where they are more than it lists. Until then they wait in a
temporary file of the driver, of which a partition with bad records costs three numbers.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.store import Store

LISTED = 1_000
"""Entries that the manifest lists."""
QUARANTINE = "quarantine.parquet"
SCHEMA = pa.schema([("url", pa.string()), ("key", pa.string()), ("record", pa.int64()), ("reason", pa.string())])
_ROWS = 10_000  # of a row group


class QuarantineList:
    """The entries: {"url", "key", "record", "reason"} each. order: the names of all partitions."""

    def __init__(self, order: Sequence[str]) -> None:
        self._number = {name: number for number, name in enumerate(order)}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the list
        self._places: list[tuple[int, int, int]] = []
        self.count = 0

    def add(self, partition: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Note the entries of one partition, of which there are some."""
        line = json.dumps(list(entries)).encode()
        start = self._file.seek(0, 2)
        self._file.write(line)
        self._places.append((self._number[partition], start, len(line)))
        self.count += len(entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All entries, in the order of partitions, a partition at a time in memory."""
        for _, start, size in sorted(self._places):
            self._file.seek(start)
            yield from json.loads(self._file.read(size))

    def listed(self) -> tuple[dict[str, Any], ...]:
        """The first `LISTED`, in the order of their URLs."""
        first = itertools.islice(self, LISTED)
        return tuple(sorted(first, key=lambda entry: (entry["url"], entry["record"] or 0)))

    def write(self, store: Store) -> dict[str, str]:
        """Commit all as `quarantine.parquet` where the manifest does not list them; its sha256 by its name."""
        if self.count <= LISTED:
            return {}
        entries = iter(self)
        with store.writing(QUARANTINE) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            while rows := list(itertools.islice(entries, _ROWS)):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        return {QUARANTINE: store.sha256(QUARANTINE)}
