"""Documents on disk between the tokenize and the pack stage: one Parquet file per partition.

In and out: `Document`s in order, or their columns. Equal documents give equal bytes (for one version of pyarrow).
Memory holds one row group of a bounded number of tokens. Columns: key, source, tokens list<int32>, loss_spans
list<struct<start, end>>, provenance as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.errors import BadData
from tokenization.document import Document

ROW_GROUP_TOKENS = 1 << 22  # 16 MB
ROW_GROUP_DOCUMENTS = 1 << 14
BATCH_TOKENS = 1 << 18
BATCH_DOCUMENTS = 1 << 10

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

SPAN = pa.struct([pa.field("start", pa.int64(), nullable=False), pa.field("end", pa.int64(), nullable=False)])
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("loss_spans", pa.list_(pa.field("element", SPAN, nullable=False)), nullable=False),
        pa.field("provenance", pa.string(), nullable=False),
    ]
)

# Of ids, two bytes of four are nearly always the same: streams of their own are compressed to less, and in less time.
_WRITER: dict[str, Any] = {
    "version": "2.6",
    "compression": "zstd",
    "use_dictionary": False,
    "use_byte_stream_split": ["tokens.list.element"],
    "write_statistics": False,
}


def write_documents(fileobj: BinaryIO, documents: Iterable[Document], row_group_tokens: int = ROW_GROUP_TOKENS) -> int:
    """Write documents as they come and return their number, as `write_batches` does."""
    return write_batches(fileobj, to_batches(documents, row_group_tokens), row_group_tokens=row_group_tokens)


def write_batches(
    fileobj: BinaryIO,
    batches: Iterable[pa.RecordBatch],
    metadata: Callable[[], Mapping[str, str]] = dict,
    row_group_tokens: int = ROW_GROUP_TOKENS,
) -> int:
    """Write batches of documents, of `SCHEMA`, as they come and return the number of documents.

    The file need not be seekable and is left open. metadata: what else the footer is to say, once all are written.
    row_group_tokens: the most tokens of a row group, unless a single document is longer. If the batches raise, the file
    is made unreadable, so that half a file is never taken for whole.
    """
    writer = pq.ParquetWriter(fileobj, SCHEMA, **_WRITER)
    count = 0
    try:
        for group in _groups(batches, row_group_tokens):
            writer.write_table(group, row_group_size=len(group))
            count += len(group)
    except BaseException:
        writer.close()  # otherwise it closes itself later and writes a valid footer at the end
        fileobj.write(b"unfinished")
        raise
    writer.add_key_value_metadata(dict(metadata()))
    writer.close()
    return count


def read_documents(fileobj: BinaryIO, rows: Collection[int] | None = None) -> Iterator[Document]:
    """The documents of a file, in order. Raises BadData on any other or incomplete file. rows: as in `read_batches`."""
    for batch in read_batches(fileobj, rows):
        yield from _from_batch(batch)


def read_batches(fileobj: BinaryIO, rows: Collection[int] | None = None) -> Iterator[pa.RecordBatch]:
    """The documents of a file in columns, in order, a row group at a time. Raises BadData as `read_documents` does.

    rows: the numbers of those to read, None for all; of row groups without any of them nothing is read.
    """
    try:
        parquet = pq.ParquetFile(fileobj, pre_buffer=False)
        if not parquet.schema_arrow.equals(SCHEMA):
            raise BadData(f"not a file of documents: its columns are {', '.join(parquet.schema_arrow.names)}")
        first = 0
        for group in range(parquet.num_row_groups):
            last = first + parquet.metadata.row_group(group).num_rows
            wanted = None if rows is None else sorted(row - first for row in rows if first <= row < last)
            first = last
            if wanted == []:
                continue
            table = parquet.read_row_group(group, use_threads=False)
            yield from (table if wanted is None else table.take(wanted)).to_batches()
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"not a whole file of documents ({str(error).splitlines()[0]})") from None


def to_batches(documents: Iterable[Document], most_tokens: int = BATCH_TOKENS) -> Iterator[pa.RecordBatch]:
    """Documents in batches of at most `BATCH_TOKENS`, or fewer, unless a single one is longer."""
    most = min(most_tokens, BATCH_TOKENS)
    group: list[Document] = []
    held = 0
    for document in documents:
        length = len(document.tokens)
        if group and (held + length > most or len(group) == BATCH_DOCUMENTS):
            yield to_batch(group)
            group, held = [], 0
        group.append(document)
        held += length
    if group:
        yield to_batch(group)


def document_batch(
    keys: pa.StringArray,
    source: str,
    tokens: np.ndarray,
    ends: np.ndarray,
    spans: np.ndarray,
    span_ends: np.ndarray,
    provenance: pa.StringArray,
) -> pa.RecordBatch:
    """Documents of one source from their columns.

    tokens: int32 [L] of all documents, of which each ends at its `ends` [n]; spans: int64 [m, 2], likewise.
    """
    columns = [
        keys,
        pa.repeat(source, len(keys)),
        _lists(ends, pa.array(tokens), "tokens"),
        _lists(span_ends, _pairs(spans), "loss_spans"),
        provenance,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def provenance_column(same: Mapping[str, Any], name: str, numbers: pa.Int64Array) -> pa.StringArray:
    """The JSON of {**same, name: number} for each of the numbers, as it is written of single documents."""
    before = _ENCODE({key: value for key, value in same.items() if key < name})[:-1]
    after = _ENCODE({key: value for key, value in same.items() if key > name})[1:]
    before += f"{',' if len(before) > 1 else ''}{_ENCODE(name)}:"
    after = f"{',' if len(after) > 1 else ''}{after}"
    return pc.binary_join_element_wise(before, numbers.cast(pa.utf8()), after, "")


def _groups(batches: Iterable[pa.RecordBatch], tokens: int) -> Iterator[pa.Table]:
    """Row groups: as many documents as the bounds allow, wherever the batches end."""
    group: list[pa.RecordBatch] = []
    held = count = 0
    for batch in batches:
        ends = _ends(batch)
        start = 0
        while start < len(batch):
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + tokens - held, side="right"))
            end = min(end, start + ROW_GROUP_DOCUMENTS - count)
            if not count:
                end = max(end, start + 1)
            if end > start:
                group.append(batch.slice(start, end - start))
                held, count = held + int(ends[end - 1] - before), count + end - start
                start = end
            if start < len(batch):
                yield pa.Table.from_batches(group)
                group, held, count = [], 0, 0
    if group:
        yield pa.Table.from_batches(group)


def _ends(batch: pa.RecordBatch) -> np.ndarray:
    """Where each document's tokens end, counted from the batch's first token: int64 [n]."""
    return np.cumsum(batch["tokens"].value_lengths().to_numpy(), dtype=np.int64)


def to_batch(group: Sequence[Document]) -> pa.RecordBatch:
    """Documents, at least one, as the rows of `SCHEMA`."""
    spans = np.array([span for document in group for span in document.loss_spans], dtype=np.int64).reshape(-1, 2)
    span_ends = np.cumsum([len(document.loss_spans) for document in group])
    tokens = np.concatenate([np.asarray(document.tokens, dtype=np.int32) for document in group])
    ends = np.cumsum([len(document.tokens) for document in group])
    columns = [
        pa.array([document.key for document in group], pa.string()),
        pa.array([document.source for document in group], pa.string()),
        _lists(ends, pa.array(tokens), "tokens"),
        _lists(span_ends, _pairs(spans), "loss_spans"),
        pa.array([_ENCODE(dict(document.provenance)) for document in group], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _pairs(spans: np.ndarray) -> pa.StructArray:
    return pa.StructArray.from_arrays([pa.array(spans[:, 0]), pa.array(spans[:, 1])], fields=list(SPAN))


def _lists(ends: np.ndarray, values: pa.Array, column: str) -> pa.ListArray:
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=SCHEMA.field(column).type)


def _from_batch(batch: pa.RecordBatch) -> Iterator[Document]:
    for key, source, tokens, spans, provenance in zip(*batch.columns):
        yield Document(
            key.as_py(),
            source.as_py(),
            tokens.values.to_numpy().copy(),  # a view would keep the whole row group in memory
            tuple((span["start"], span["end"]) for span in spans.as_py()),
            json.loads(provenance.as_py()),
        )
