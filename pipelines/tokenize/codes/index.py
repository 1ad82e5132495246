"""Which files of a store of codes have media of an object: in memory, and in files beside those of the codes.

Missing or damaged, an index file costs no more than time: the footers of the files of codes say the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.dag.manifest import digest
from storage.errors import BadData
from storage.object_store.errors import StoreError
from storage.store import Store
from storage.threads import in_threads
from tokenization.codecs.codes_file import ID_BYTES, CodesFile

log = logging.getLogger("ringworld")

DATA, INDEX = "data", "index"
"""Folders of an encoding."""
_INDEX_SCHEMA = pa.schema([("object", pa.binary(ID_BYTES)), ("file", pa.string())])
_UNSORTED = 1 << 16  # objects that are added before they are sorted in, at least; each takes 200 bytes meanwhile
_UNINDEXED = 16  # files whose footers are read one by one, at most, before an index file is written of them


class CodesIndex:
    """Which files have media of an object. 12 bytes an object and file, and the names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names: list[str] = []
        self._keys, self._files = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._added: dict[int, list[int]] = {}

    def load(self) -> None:
        """Read the index files, and the footers of files that are in none."""
        keys, files = [], []
        known: set[str] = set()
        present = set(self._store.names(DATA))
        for table in in_threads(partial(_index_table, self._store), self._store.names(INDEX)):
            named = table.column("file").combine_chunks().dictionary_encode()
            names = named.dictionary.to_pylist()
            is_fresh = np.array([name in present and name not in known for name in names], bool)
            numbers = np.where(is_fresh, len(self._names) + np.cumsum(is_fresh) - 1, -1).astype(np.int32)
            self._names += [name for name, fresh in zip(names, is_fresh) if fresh]
            known.update(names)
            of_row = numbers[named.indices.to_numpy()]
            keys.append(_keys(table.column("object").combine_chunks())[of_row >= 0])
            files.append(of_row[of_row >= 0])
        self._sort_in(keys, files)
        for name, objects in in_threads(partial(_objects_of, self._store), sorted(present - known)):
            self.add(name, objects)

    def find(self, objects: Sequence[bytes]) -> list[list[str]]:
        """For each object the files that may have media of it, sorted: the same whichever was indexed first."""
        found = []
        for one in objects:
            key = _key(one)
            low, high = (int(np.searchsorted(self._keys, np.uint64(key), side)) for side in ("left", "right"))
            files = [*self._files[low:high].tolist(), *self._added.get(key, ())]
            found.append(sorted({self._names[number] for number in files}))
        return found

    def add(self, name: str, objects: Sequence[bytes]) -> None:
        """Note a file that was committed."""
        self._names.append(name)
        for one in objects:
            self._added.setdefault(_key(one), []).append(len(self._names) - 1)
        if len(self._added) > max(_UNSORTED, len(self._keys) // 8):
            added = [(key, file) for key, files in self._added.items() for file in files]
            keys, numbers = zip(*added)
            self._sort_in([np.array(keys, np.uint64)], [np.array(numbers, np.int32)])
            self._added = {}

    def _sort_in(self, keys: Sequence[np.ndarray], files: Sequence[np.ndarray]) -> None:
        """Keys of objects, and the number of a file for each."""
        self._keys, self._files = np.concatenate([self._keys, *keys]), np.concatenate([self._files, *files])
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._files = self._keys[order], self._files[order]


def write_index(store: Store) -> None:
    """Write an index file of the files that are in none yet, if they are many."""
    indexed: set[str] = set()
    for name in store.names(INDEX):
        indexed.update(_index_table(store, name).column("file").unique().to_pylist())
    missing = [name for name in store.names(DATA) if name not in indexed]
    if len(missing) <= _UNINDEXED:
        return
    rows = [(one, name) for name, objects in in_threads(partial(_objects_of, store), missing) for one in objects]
    objects, files = pa.array([one for one, _ in rows], pa.binary(ID_BYTES)), pa.array([name for _, name in rows])
    _create_index(store, pa.table({"object": objects, "file": files.dictionary_encode()}))


def renew_index(store: Store) -> None:
    """Write the index files anew that name files of codes that have been removed."""
    present = pa.array(store.names(DATA), pa.string())
    stale, rows = [], []
    names = store.names(INDEX)
    for name, table in zip(names, in_threads(partial(_index_table, store), names)):
        is_there = pc.is_in(table.column("file").cast(pa.string()), value_set=present)
        if not pc.all(is_there).as_py():
            stale.append(name)
            rows.append(table.filter(is_there))
    if stale:
        _create_index(store, pa.concat_tables(rows, promote_options="permissive"))
        store.delete_many(stale)


def _create_index(store: Store, rows: pa.Table) -> None:
    """Commit an index file, unless there are no rows or there is one of these files."""
    files = sorted(rows.column("file").unique().to_pylist())
    name = f"{INDEX}/{digest(files)[:32]}.parquet"
    with contextlib.suppress(FileExistsError):
        if files:
            with store.writing(name, exclusive=True) as file:
                pq.write_table(rows, file, compression="zstd")


def _index_table(store: Store, name: str) -> pa.Table:
    """The columns `object` and `file` of an index file; of one that is damaged nothing, and the footers are read."""
    try:
        with store.open(name) as file:
            return pq.read_table(file, columns=_INDEX_SCHEMA.names, use_threads=False).cast(_INDEX_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StoreError):
            raise
        log.warning("tokenize: passed over %s, which is no index of codes (%s)", store.path(name), error)
        return _INDEX_SCHEMA.empty_table()


def _objects_of(store: Store, name: str) -> tuple[str, list[bytes]]:
    """The name of a file of codes, and the objects that it has media of, from its footer; none of a damaged file."""
    with contextlib.suppress(BadData, FileNotFoundError), store.open_ranged(name) as file:
        return name, CodesFile(file).objects
    log.warning("tokenize: passed over %s, which is no whole file of codes", store.path(name))
    return name, []


def _key(object: bytes) -> int:
    return int.from_bytes(object[:8], "little")


def _keys(objects: pa.FixedSizeBinaryArray) -> np.ndarray:
    """uint64 [n]: `_key` of each object."""
    halves = np.frombuffer(objects.buffers()[1] or b"", "<u8").reshape(-1, ID_BYTES // 8)
    return halves[objects.offset : objects.offset + len(objects), 0].copy()
