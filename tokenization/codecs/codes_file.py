"""A file of codes: what a codec made of many media, as Parquet, a row a medium.

In and out: `MediumCodes`. Rows of the same object stand together; the footer says which objects each row group has, so
that a reader takes only the row groups that it needs. Memory holds one row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import BadData
from storage.object_store.errors import StoreError

ID_BYTES = 16
ROW_GROUP_CODES = 1 << 20  # 4 MB
_OBJECTS, _COUNTS = b"ringworld.objects", b"ringworld.objects_per_row_group"


def _list_of(kind: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field("object", pa.binary(ID_BYTES), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("total", pa.int64(), nullable=False),
        pa.field("numbers", _list_of(pa.int64()), nullable=False),
        pa.field("times", _list_of(pa.float64()), nullable=False),
        pa.field("codes", _list_of(pa.int32()), nullable=False),
        pa.field("encoder", pa.string(), nullable=False),
    ]
)


def object_id(url: str, etag: str) -> bytes:
    """What names one version of an object: `ID_BYTES` of the sha256 of its URL and its etag."""
    return hashlib.sha256(f"{url}\0{etag}".encode("utf-8", "surrogateescape")).digest()[:ID_BYTES]


@dataclass(frozen=True, eq=False)
class MediumCodes:
    """Codes of some frames of a medium.

    object: `object_id` of what holds its bytes. member: which of the media in there, "" where the object is the medium.
    total: samples of the whole video at the encoding's rate, 1 of an image. numbers: int64 [n], ascending, which of
    them these are. times: float64 [n], seconds. codes: int32 [n, codes of a frame]. encoder: what made them.
    """

    object: bytes
    member: str
    total: int
    numbers: np.ndarray
    times: np.ndarray
    codes: np.ndarray
    encoder: str


class CodesWriter:
    """Writes a file row group by row group. The file need not seek, and is left open; it is whole after `close`."""

    def __init__(self, fileobj: BinaryIO) -> None:
        columns = ["codes.list.element"]
        self._writer = pq.ParquetWriter(
            fileobj,
            SCHEMA,
            compression="zstd",
            use_dictionary=["encoder"],
            use_byte_stream_split=columns,  # 13 bits of information in 32, which zstd finds only byte by byte
            write_statistics=False,
            write_page_checksum=True,  # runs and users share it for years, and codes look alike
        )
        self._rows: list[MediumCodes] = []
        self._held = 0
        self._objects: list[list[bytes]] = []

    def write(self, row: MediumCodes) -> None:
        """Add a medium."""
        self._rows.append(row)
        self._held += row.codes.size
        if self._held >= ROW_GROUP_CODES:
            self._write_group()

    @property
    def objects(self) -> list[bytes]:
        """The objects written so far, each once, in order."""
        held = [row.object for row in self._rows]
        return list(dict.fromkeys([one for group in self._objects for one in group] + held))

    def close(self) -> None:
        """Write what is held, and the footer."""
        if self._rows:
            self._write_group()
        counts = np.array([len(group) for group in self._objects], "<u4").tobytes()
        joined = b"".join(one for group in self._objects for one in group)
        self._writer.add_key_value_metadata({_OBJECTS: joined.hex(), _COUNTS: counts.hex()})
        self._writer.close()

    def _write_group(self) -> None:
        rows = self._rows
        columns = [
            pa.array([row.object for row in rows], SCHEMA.field("object").type),
            pa.array([row.member for row in rows], pa.string()),
            pa.array([row.total for row in rows], pa.int64()),
            *(_lists([np.ravel(getattr(row, name)) for row in rows], name) for name in ("numbers", "times", "codes")),
            pa.array([row.encoder for row in rows], pa.string()),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA), row_group_size=len(rows))
        self._objects.append(list(dict.fromkeys(row.object for row in rows)))
        self._rows, self._held = [], 0


class CodesFile:
    """A file of codes, open for reading. Raises BadData on any other or incomplete file."""

    def __init__(self, fileobj: BinaryIO) -> None:
        with _damage():
            self._parquet = pq.ParquetFile(fileobj, pre_buffer=False, page_checksum_verification=True)
            if not self._parquet.schema_arrow.equals(SCHEMA):
                raise BadData("not a file of codes")
            metadata = self._parquet.metadata.metadata or {}
            joined, counts = (bytes.fromhex(metadata[key].decode()) for key in (_OBJECTS, _COUNTS))
            ids = [joined[start : start + ID_BYTES] for start in range(0, len(joined), ID_BYTES)]
            ends = np.cumsum(np.frombuffer(counts, "<u4")).tolist()
            if len(ends) != self._parquet.num_row_groups or (ends or [0])[-1] != len(ids):
                raise BadData("not a whole file of codes (its list of objects does not fit)")
        self._groups = [frozenset(ids[start:end]) for start, end in zip([0, *ends], ends)]

    @property
    def objects(self) -> list[bytes]:
        """The ids of its objects, each once."""
        return list(dict.fromkeys(one for group in self._groups for one in sorted(group)))

    def groups_of(self, object: bytes) -> list[int]:
        """The row groups that have media of an object."""
        return [number for number, group in enumerate(self._groups) if object in group]

    def members(self, group: int) -> list[tuple[bytes, str]]:
        """The object and member of each row of a row group."""
        with _damage():
            table = self._parquet.read_row_group(group, columns=["object", "member"], use_threads=False)
        return list(zip(table.column(0).to_pylist(), table.column(1).to_pylist()))

    def rows(self, group: int) -> list[MediumCodes]:
        """The media of a row group."""
        with _damage():
            batch = self._parquet.read_row_group(group, use_threads=False).combine_chunks().to_batches()[0]
            objects, members, totals, numbers, times, codes, encoders = batch.columns
            if not numbers.offsets.equals(times.offsets):  # the headers of pages have no checksum
                raise BadData("not a whole file of codes (its media have more times or fewer than frames)")
            return [
                MediumCodes(
                    objects[row].as_py(),
                    members[row].as_py(),
                    totals[row].as_py(),
                    of_row := numbers[row].values.to_numpy(),
                    times[row].values.to_numpy(),
                    codes[row].values.to_numpy().reshape(len(of_row), -1),
                    encoders[row].as_py(),
                )
                for row in range(len(batch))
            ]

    def __iter__(self) -> Iterator[MediumCodes]:
        for group in range(len(self._groups)):
            yield from self.rows(group)


class _damage:  # noqa: N801 - reads as a statement
    """Turns what pyarrow raises on a broken file into BadData."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (BadData, StoreError)):
            return
        if isinstance(error, (pa.ArrowException, OSError, LookupError, ValueError)):
            raise BadData(f"not a whole file of codes ({(str(error) or 'empty').splitlines()[0]})") from None


def _lists(values: list[np.ndarray], name: str) -> pa.ListArray:
    kind = SCHEMA.field(name).type
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
    joined = np.concatenate(values).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(joined), type=kind)
