"""Parquet to records: rows of the columns asked for, a few at a time; what other columns hold is not looked at.

Pages are decoded whole; rows that expand to many times their stored bytes, as in a decompression bomb, are refused
before that. A struct `{bytes, path}`, as the `datasets` library writes pictures, is its bytes, or else its path.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import BadData
from tokenization.readers.record import READ_BYTES, BadRecord, Record

_ROWS = 64  # decoded at a time, at least
_MOST_ROWS = 1024
_ROW_BYTES = 1 << 20  # about so many of rows that are decoded at a time
BATCH_BYTES = 128 << 20  # most bytes of those rows, where a dictionary makes rows larger than they are stored
_UNREADABLE = (ValueError, OverflowError, LookupError, pa.ArrowException)  # LookupError: no such time zone
EXPANSION = 200  # most decoded bytes per stored byte of a Parquet row group over `BATCH_BYTES`; text has 3 to 10


def read_parquet(file: BinaryIO, columns: Collection[str] | None, limit: int) -> Iterator[Record | BadRecord]:
    """Records with their row's number. Raises BadData where it is no Parquet file or has none of the columns."""
    parquet, names = _opened(file)
    wanted = [name for name in names if columns is None or name in columns]
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise BadData(f'the column "{twice[0]}" occurs twice')
    if not wanted and columns is not None:
        raise BadData(f"it has no column {' or '.join(map(repr, columns))}, but {', '.join(map(repr, names[:20]))}")
    first = 0
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        index, end = first, first + group.num_rows
        first = end
        try:
            rows, most = _bounds(file, group, wanted, limit)
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=wanted, use_threads=False):
                batch = _decoded(batch)
                most -= batch.nbytes
                if most < 0:
                    raise BadData("they expand to many times their stored bytes")
                yield from _records(batch, index, limit)
                index += batch.num_rows
        except (pa.ArrowException, OSError, ValueError, BadData) as error:
            yield BadRecord(index, f"rows {index} to {end - 1} are unreadable ({_first_line(error)})")


def parquet_columns(file: BinaryIO) -> list[str]:
    """The names of the columns. Raises BadData where it is no Parquet file."""
    return _opened(file)[1]


def _opened(file: BinaryIO) -> tuple[pq.ParquetFile, list[str]]:
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True)
        return parquet, parquet.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadData(f"not a whole Parquet file ({_first_line(error)})") from None


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch without dictionaries: in those, Arrow counts each row as four bytes."""
    columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _bounds(file: BinaryIO, group: pq.RowGroupMetaData, wanted: Collection[str], limit: int) -> tuple[int, int]:
    """The number of rows of a row group to decode at a time, and the most bytes that all its rows may have.

    Raises BadData where the file's own metadata states more bytes.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    columns = [one for one in columns if any(f"{one.path_in_schema}.".startswith(f"{name}.") for name in wanted)]
    stored = sum(column.total_compressed_size for column in columns)
    most = max(BATCH_BYTES, EXPANSION * stored)
    # A run of equal values in lists is stored as one value, so their number counts as well as the uncompressed size.
    size = sum(max(column.total_uncompressed_size, 4 * column.num_values) for column in columns)
    if size > most:
        raise BadData(f"{size} bytes are stored in {stored}")
    rows = min(max(_ROWS, _ROW_BYTES * group.num_rows // max(1, size)), _MOST_ROWS)
    for column in columns:
        if column.has_dictionary_page and rows * column.total_uncompressed_size > BATCH_BYTES:
            rows = min(rows, max(1, BATCH_BYTES // max(1, _dictionary_bytes(file, column))))
    return rows, most


def _dictionary_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """The decompressed size of a column's dictionary, which is the most that a row can have.

    It is the second integer of a page header. In Thrift's compact protocol an integer is a byte for the field, then
    seven bits per byte from the lowest on, of which the lowest is the sign.
    """
    file.seek(column.dictionary_page_offset)
    size = re.match(rb".[\x80-\xff]*[\x00-\x7f].([\x80-\xff]*[\x00-\x7f])", file.read(32), re.DOTALL)
    if size is None:  # no header that a writer makes
        return int(column.total_uncompressed_size)
    value = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(size[1]))
    return min(value >> 1, int(column.total_uncompressed_size))


def _records(batch: pa.RecordBatch, first: int, limit: int) -> Iterator[Record | BadRecord]:
    """The rows of a batch, converted together unless one may be too large or not text."""
    names = batch.schema.names
    if batch.nbytes <= limit:
        try:
            columns = [_values(column) for column in batch.columns]
        except _UNREADABLE:
            pass
        else:
            yield from enumerate((dict(zip(names, row)) for row in zip(*columns)), first)
            return
    for index in range(first, first + batch.num_rows):
        row = batch.slice(index - first, 1)
        if row.nbytes > limit:
            yield BadRecord(index, f"row {index}: larger than {limit} bytes, the most for one record")
            continue
        try:
            yield index, {name: _value(name, column) for name, column in zip(names, row.columns)}
        except BadData as error:
            yield BadRecord(index, f"row {index}: {error}")


def _value(name: str, column: pa.Array) -> Any:
    try:
        return _values(column)[0]
    except UnicodeDecodeError as error:
        with_offset = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise BadData(f'the column "{name}" is not UTF-8: {with_offset}') from None
    except _UNREADABLE as error:
        raise BadData(f'the column "{name}" cannot be read ({_first_line(error)})') from None


def _values(column: pa.Array) -> list[Any]:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        with contextlib.suppress(
            pa.ArrowException
        ):  # of text that is not UTF-8, of which the slower way names the place
            values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()  # three times as fast
            return values
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        places = {one.name: place for place, one in enumerate(kind)}
        parts = [column.field(places[name]).to_pylist() for name in ("bytes", "path") if name in places]
        return [next((value for value in row if value is not None), None) for row in zip(*parts)]
    return column.to_pylist()


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
