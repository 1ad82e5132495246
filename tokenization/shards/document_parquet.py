"""Documents on disk between the tokenize and the pack stage: one Parquet file per partition.

In and out: `Document`s in order. Equal documents give equal bytes (for one version of pyarrow). Memory holds one row
group of a bounded number of tokens. Columns: key, source, tokens list<int32>, loss_spans list<struct<start, end>>,
provenance as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import BadData
from tokenization.document import Document

ROW_GROUP_TOKENS = 1 << 22  # 16 MB
ROW_GROUP_DOCUMENTS = 1 << 14

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


def write_documents(fileobj: BinaryIO, documents: Iterable[Document], row_group_tokens: int = ROW_GROUP_TOKENS) -> int:
    """Write documents as they come and return their number. The file need not be seekable and is left open.

    row_group_tokens: the most tokens of a row group, unless a single document is longer. If the documents raise, the
    file is made unreadable, so that half a file is never taken for a whole one.
    """
    writer = pq.ParquetWriter(fileobj, SCHEMA, version="2.6", compression="zstd", use_dictionary=False)
    count = 0
    try:
        for group in _groups(documents, row_group_tokens):
            writer.write_batch(_to_batch(group), row_group_size=len(group))
            count += len(group)
    except BaseException:
        writer.close()  # otherwise it closes itself later and writes a valid footer at the end
        fileobj.write(b"unfinished")
        raise
    writer.close()
    return count


def read_documents(fileobj: BinaryIO, rows: Collection[int] | None = None) -> Iterator[Document]:
    """The documents of a file, in order, a row group at a time. Raises BadData on any other or incomplete file.

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
            for batch in (table if wanted is None else table.take(wanted)).to_batches():
                yield from _from_batch(batch)
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"not a whole file of documents ({str(error).splitlines()[0]})") from None


def _groups(documents: Iterable[Document], tokens: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    held = 0
    for document in documents:
        length = len(document.tokens)
        if group and (held + length > tokens or len(group) == ROW_GROUP_DOCUMENTS):
            yield group
            group, held = [], 0
        group.append(document)
        held += length
    if group:
        yield group


def _to_batch(group: list[Document]) -> pa.RecordBatch:
    spans = np.array([span for document in group for span in document.loss_spans], dtype=np.int64).reshape(-1, 2)
    pairs = pa.StructArray.from_arrays([pa.array(spans[:, 0]), pa.array(spans[:, 1])], fields=list(SPAN))
    tokens = np.concatenate([np.asarray(document.tokens, dtype=np.int32) for document in group])
    columns = [
        pa.array([document.key for document in group], pa.string()),
        pa.array([document.source for document in group], pa.string()),
        _lists([len(document.tokens) for document in group], pa.array(tokens), SCHEMA.field("tokens").type),
        _lists([len(document.loss_spans) for document in group], pairs, SCHEMA.field("loss_spans").type),
        pa.array([_ENCODE(dict(document.provenance)) for document in group], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(lengths: list[int], values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def _from_batch(batch: pa.RecordBatch) -> Iterator[Document]:
    for key, source, tokens, spans, provenance in zip(*batch.columns):
        yield Document(
            key.as_py(),
            source.as_py(),
            tokens.values.to_numpy().copy(),  # a view would keep the whole row group in memory
            tuple((span["start"], span["end"]) for span in spans.as_py()),
            json.loads(provenance.as_py()),
        )
