"""The codes store: what a codec has made of media, found again by any run, recipe and user that names the store.

`CODES/ENCODING/data/*.parquet` are files of codes (`tokenization.codecs.codes_file`), a few to a partition, and
`index/*.parquet` say which objects each file has, for all files at once. ENCODING hashes what decides the codes beside
the medium. No lease covers a store that many runs share: files are created and never changed. Of two tasks that encode
the same media the first to commit wins, and the other starts again and finds them. Only `ringworld clean` removes any,
once it has the lease of every run that `runs/*.json` name (`pipelines.tokenize.codes_users`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.same_code import as_driver
from pipelines.dag.manifest import digest
from pipelines.dag.records import in_threads
from storage.errors import BadData
from storage.object_store.errors import StoreError
from storage.store import Store
from tokenization.codecs.codes_file import ID_BYTES, CodesFile, CodesWriter, MediumCodes, object_id

log = logging.getLogger("ringworld")

ENCODING_VERSION = 1
"""Raised by hand when the same frames of a medium give other codes than before: by how they are decoded, or encoded."""
DATA, INDEX, DESCRIPTION = "data", "index", "encoding.json"
_INDEX_SCHEMA = pa.schema([("object", pa.binary(ID_BYTES)), ("file", pa.string())])
_FILE_CODES = 1 << 26  # about 100 MB
_FILE_SECONDS = 600.0  # after which what has been encoded is committed, so that a task that dies loses no more
_UNINDEXED = 16  # files whose footers are read one by one, at most, before an index file is written of them
_INDEX_RESTARTS = 20  # of its process in a stage, on the driver's own node
_KEPT_MEMBERS, _KEPT_ROWS, _OPEN_FILES = 64, 4, 8  # row groups, by their names and as a whole, and files of a task


@dataclass(frozen=True)
class Encoding:
    """What decides codes beside the medium. codec: fingerprint of its weights. fps: samples of video a second."""

    codec: str
    precision: str
    resolution: int
    fps: float
    version: int = ENCODING_VERSION

    @property
    def folder(self) -> str:
        """Its folder in a store."""
        return digest(asdict(self))[:16]


class OvertakenError(Exception):
    """Another task has just committed codes of the same media: they are in the store now, and are the ones to use."""


class CodesIndex:
    """Which files have media of an object. 12 bytes an object and file, and the names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names: list[str] = []
        self._keys, self._files = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._added: dict[int, list[int]] = {}

    def load(self) -> None:
        """Read the index files, and the footers of files that are in none."""
        keys, files = [self._keys], [self._files]
        known: set[str] = set()
        present = set(self._store.names(DATA))
        for table in in_threads(self._read_index, self._store.names(INDEX)):
            names = table.column("file").unique().to_pylist()
            fresh = [name for name in names if name in present and name not in known]
            numbers = dict(zip(fresh, range(len(self._names), len(self._names) + len(fresh))))
            self._names += fresh
            known.update(fresh)
            of_row = np.array([numbers.get(name, -1) for name in table.column("file").to_pylist()], np.int32)
            keys.append(_keys(table.column("object").combine_chunks())[of_row >= 0])
            files.append(of_row[of_row >= 0])
        self._keys, self._files = np.concatenate(keys), np.concatenate(files)
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._files = self._keys[order], self._files[order]
        for name, objects in in_threads(self._read_footer, sorted(present - known)):
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

    def _read_index(self, name: str) -> pa.Table:
        return _index_table(self._store, name)

    def _read_footer(self, name: str) -> tuple[str, list[bytes]]:
        with contextlib.suppress(BadData, FileNotFoundError), self._store.open_ranged(name) as file:
            return name, CodesFile(file).objects
        log.warning("tokenize: passed over %s, which is no whole file of codes", self._store.path(name))
        return name, []


def write_index(store: Store) -> None:
    """Write an index file of the files that are in none yet, if they are many."""
    indexed: set[str] = set()
    for name in store.names(INDEX):
        indexed.update(_index_table(store, name).column("file").unique().to_pylist())
    missing = [name for name in store.names(DATA) if name not in indexed]
    if len(missing) <= _UNINDEXED:
        return
    index = CodesIndex(store)
    rows = [(one, name) for name, objects in in_threads(index._read_footer, missing) for one in objects]
    objects, files = pa.array([one for one, _ in rows], pa.binary(ID_BYTES)), pa.array([name for _, name in rows])
    _create_index(store, pa.table({"object": objects, "file": files.dictionary_encode()}))


def renew_index(store: Store) -> None:
    """Write the index files anew that name files of codes that have been removed."""
    present = pa.array(store.names(DATA), pa.string())
    stale, rows = [], []
    index = CodesIndex(store)
    names = store.names(INDEX)
    for name, table in zip(names, in_threads(index._read_index, names)):
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


@ray.remote(num_cpus=0)
class _IndexActor:
    """The index of one encoding, for all tasks of a stage. Its state may be lost: it is read again."""

    @as_driver
    def __init__(self, store: Store) -> None:
        self._store = store
        self._index: CodesIndex | None = None

    def find(self, objects: list[bytes]) -> list[list[str]]:
        return self._loaded().find(objects)

    def add(self, name: str, objects: list[bytes]) -> None:
        self._loaded().add(name, objects)

    def _loaded(self) -> CodesIndex:
        if self._index is None:
            self._index = CodesIndex(self._store)
            self._index.load()
        return self._index


@dataclass(frozen=True)
class CodesPlace:
    """Where the codes of one encoding are. store: its folder. index: answers `find` and takes `add`."""

    store: Store
    index: Any

    @property
    def encoding(self) -> str:
        """The folder's name."""
        return self.store.url.rpartition("/")[2]


@contextlib.contextmanager
def codes_place(store: Store, encoding: Encoding) -> Iterator[CodesPlace]:
    """The place of an encoding in a store of codes, with its index on the driver's node, while the block runs."""
    folder = store.at(encoding.folder)
    folder.create_json(DESCRIPTION, asdict(encoding))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": _INDEX_RESTARTS, "max_task_retries": _INDEX_RESTARTS, "scheduling_strategy": here}
    actor = _IndexActor.options(**options).remote(folder)  # type: ignore[attr-defined]
    try:
        yield CodesPlace(folder, actor)
        write_index(folder)
    finally:
        ray.kill(actor)


Identity = tuple[str, str, str]
"""URL and etag of the object that holds a medium, and which of its media it is."""


class Codes:
    """The codes that one task finds and makes. To be closed by `commit`, before what is built of them is committed."""

    def __init__(self, place: CodesPlace) -> None:
        self._place = place
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._members = functools.lru_cache(_KEPT_MEMBERS)(self._read_members)
        self._rows = functools.lru_cache(_KEPT_ROWS)(self._read_rows)
        self._files_of = functools.lru_cache(_KEPT_MEMBERS)(self._find)
        self._writer: CodesWriter | None = None
        self.frames_added = 0

    def find(self, identity: Identity, choose: Callable[[int], np.ndarray]) -> MediumCodes | None:
        """The codes of a medium's frames, if all are there, of one encoder.

        choose: from the samples of the whole medium to the numbers of those wanted, int64, ascending.
        """
        rows = list(self._stored(identity))
        for encoder in dict.fromkeys(row.encoder for row in rows):
            of_encoder = [row for row in rows if row.encoder == encoder]
            numbers = np.concatenate([row.numbers for row in of_encoder])
            wanted = choose(of_encoder[0].total)
            numbers, first = np.unique(numbers, return_index=True)
            at = np.searchsorted(numbers, wanted)
            if len(wanted) and at[-1] < len(numbers) and (numbers[at] == wanted).all():
                times = np.concatenate([row.times for row in of_encoder])[first[at]]
                codes = np.concatenate([row.codes for row in of_encoder])[first[at]]
                return replace(of_encoder[0], numbers=wanted, times=times, codes=codes)
        return None

    def add(
        self,
        identity: Identity,
        total: int,
        numbers: np.ndarray,
        times: np.ndarray,
        codes: np.ndarray,
        encoder: str,
    ) -> None:
        """Keep the codes of a medium that has just been encoded. Raises `OvertakenError`, as `commit`."""
        url, etag, member = identity
        if self._writer is None:
            self._scratch = tempfile.TemporaryFile()  # noqa: SIM115 - lives until it is committed
            self._writer, self._named = CodesWriter(cast(BinaryIO, self._scratch)), hashlib.sha256()
            self._codes, self._since = 0, time.monotonic()
        row = MediumCodes(object_id(url, etag), member, total, numbers, times, codes, encoder)
        self._writer.write(row)
        self._named.update(row.object + member.encode() + b"\0" + numbers.tobytes())
        self._codes += codes.size
        self.frames_added += len(codes)
        if self._codes >= _FILE_CODES or time.monotonic() - self._since > _FILE_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make what was added visible. Raises `OvertakenError` where another task was first with the same media."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        objects = writer.objects
        writer.close()
        with self._scratch as scratch:
            name, is_first = self._create(scratch, self._named.hexdigest()[:32])
        ray.get(self._place.index.add.remote(name, objects))
        if not is_first:
            raise OvertakenError(name)

    def _create(self, scratch: BinaryIO, stem: str) -> tuple[str, bool]:
        """Commit a file under a name that is free, or that of the same media; which, and whether it was free."""
        for number in itertools.count():
            name = f"{DATA}/{stem}{f'-{number}' if number else ''}.parquet"
            with contextlib.suppress(FileExistsError):
                with self._place.store.writing(name, exclusive=True) as file:
                    scratch.seek(0)
                    shutil.copyfileobj(scratch, file, 1 << 22)
                return name, True
            if self._is_whole(name):
                return name, False
        raise AssertionError("there is no last number")

    def _is_whole(self, name: str) -> bool:
        with contextlib.suppress(BadData), self._place.store.open(name) as file:
            for _ in CodesFile(file):
                pass
            return True
        return False

    def _stored(self, identity: Identity) -> Iterator[MediumCodes]:
        """What there is of a medium, in the order of the files."""
        url, etag, member = identity
        wanted = (object_id(url, etag), member)
        for name in self._files_of(wanted[0]):
            try:
                file = self._file(name)
                for group in file.groups_of(wanted[0]):
                    row = self._members(name, group).get(wanted)
                    if row is not None:
                        yield self._rows(name, group)[row]
            except (BadData, FileNotFoundError) as error:  # removed, or damaged: it is encoded again
                log.warning("tokenize: passed over the codes in %s (%s)", self._place.store.path(name), error)

    def _find(self, object: bytes) -> list[str]:
        (names,) = ray.get(self._place.index.find.remote([object]))
        return cast("list[str]", names)

    def _open(self, name: str) -> CodesFile:
        return CodesFile(self._place.store.open_ranged(name))

    def _read_members(self, name: str, group: int) -> dict[tuple[bytes, str], int]:
        return {one: row for row, one in enumerate(self._file(name).members(group))}

    def _read_rows(self, name: str, group: int) -> list[MediumCodes]:
        return self._file(name).rows(group)


def _key(object: bytes) -> int:
    return int.from_bytes(object[:8], "little")


def _keys(objects: pa.FixedSizeBinaryArray) -> np.ndarray:
    """uint64 [n]: `_key` of each object."""
    joined = b"".join(objects.to_pylist())
    return np.frombuffer(joined, "<u8")[::2].copy()
