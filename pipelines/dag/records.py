"""Records of the partitions that a stage has committed, read and written in bulk.

A stage of few large partitions has a JSON file a record (`JsonRecords`). Where there may be a hundred thousand, that
would be as many requests: there each record stands in the footer of the Parquet file that its task commits, and the
driver writes many at once to `records/*.jsonl` besides (`FooterRecords`). A driver that dies loses none: what the bulk
files lack is read from the footers. Both are kept for all that a stage ever made in a run, by the partition's content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UserError
from storage.store import Store
from storage.threads import in_threads
from tokenization.shards.shard import hash_file

log = logging.getLogger("ringworld")

Record = dict[str, Any]
RECORD_KEY = "ringworld.record"
"""Of a Parquet file's key-value metadata: the record, as JSON."""
_BULK = "records"
_PENDING = 64  # records, at least, that are written to a bulk file together
_SHARE = 64  # of all that are written, one part in so many may be missing from the bulk files
_MANY = 256  # bulk files, above which they are joined


class Records(Protocol):
    """Where the records of a stage are."""

    def load(self, partitions: Collection[str]) -> Iterator[Record]:
        """The records of those of the partitions that are committed, in any order."""

    def add(self, record: Record) -> None:
        """Note the record of a partition that its task has committed."""

    def flush(self) -> None:
        """Write what has been noted."""


class JsonRecords:
    """A file a record, `partitions/NAME.json`, which the task commits."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @staticmethod
    def name(partition: str) -> str:
        """Where the record of a partition is committed."""
        return f"partitions/{partition}.json"

    def load(self, partitions: Collection[str]) -> Iterator[Record]:
        """See `Records`."""
        present = set(self._store.names("partitions"))
        names = [name for name in map(self.name, partitions) if name in present]
        return in_threads(lambda name: cast(Record, self._store.read_json(name)), names)

    def add(self, record: Record) -> None:
        """Nothing is left to do."""

    def flush(self) -> None:
        """Nothing is left to do."""


class FooterRecords:
    """Records in the footers of `FOLDER/NAME.parquet`, and in bulk. store: of all that the stage makes in a run.

    A record as a whole has besides: file, its name; sha256, of the file.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._pending: list[Record] = []
        self._written = 0
        self._files: list[str] = []

    def file(self, partition: str) -> str:
        """Where the file of a partition is committed."""
        return f"{self._folder}/{partition}.parquet"

    def load(self, partitions: Collection[str]) -> Iterator[Record]:
        """See `Records`."""
        wanted = {self.file(partition) for partition in partitions}
        missing = wanted.intersection(self._store.names(self._folder))
        self._files = self._store.names(_BULK)
        for records in in_threads(self._read_bulk, reversed(self._files)):  # of a file made again, the later counts
            self._written += len(records)
            for record in reversed(records):
                if record["file"] in missing:
                    missing.remove(record["file"])
                    yield record
        for record in in_threads(self._read_footer, sorted(missing)):
            self.add(record)
            yield record
        if len(self._files) > _MANY:
            self._join()

    def add(self, record: Record) -> None:
        """See `Records`."""
        self._pending.append(record)
        if len(self._pending) >= max(_PENDING, self._written // _SHARE):
            self.flush()

    def flush(self) -> None:
        """See `Records`."""
        if self._pending:
            self._write(self._pending)
            self._written += len(self._pending)
            self._pending = []

    def drop_removed(self) -> None:
        """Write the bulk files anew where most of their records are of files that have been removed."""
        present = set(self._store.names(self._folder))
        self._files = self._store.names(_BULK)
        records = [record for records in in_threads(self._read_bulk, self._files) for record in records]
        left = {record["file"]: record for record in records if record["file"] in present}
        if 2 * len(left) < len(records):
            self._replace(list(left.values()))

    def _join(self) -> None:
        """One bulk file in place of many."""
        read = in_threads(self._read_bulk, list(self._files))
        self._replace(list({record["file"]: record for records in read for record in records}.values()))

    def _replace(self, records: Sequence[Record]) -> None:
        """One bulk file in place of all. A driver that dies in between leaves records twice, which harms nothing."""
        old = list(self._files)
        if records:
            self._write(records)
        self._store.delete_many(old)
        self._files = [name for name in self._files if name not in old]

    def _write(self, records: Sequence[Record]) -> None:
        last = max((int(name.rpartition("/")[2].partition(".")[0]) for name in self._files), default=-1)
        self._files = [*self._files, f"{_BULK}/{last + 1:08d}.jsonl"]
        with self._store.writing(self._files[-1]) as file:
            for record in records:
                file.write(json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n")

    def _read_bulk(self, name: str) -> list[Record]:
        try:
            return [json.loads(line) for line in (self._store.read_bytes(name) or b"").splitlines()]
        except ValueError:
            log.warning("%s is damaged; its records are read from the footers", self._store.path(name))
            return []

    def _read_footer(self, name: str) -> Record:
        try:
            with self._store.local_copy(name) as path, open(path, "rb") as file:
                return read_record(file) | {"file": name, "sha256": hash_file(file)}
        except (pa.ArrowException, KeyError, ValueError):
            raise UserError(
                f"{self._store.path(name)}: this is not the Parquet file that was written (a power cut, a full disk?); "
                f"delete it and run again"
            ) from None


def read_record(file: BinaryIO) -> Record:
    """The record in the footer of a Parquet file."""
    return cast(Record, json.loads(pq.read_metadata(file).metadata[RECORD_KEY.encode()]))
