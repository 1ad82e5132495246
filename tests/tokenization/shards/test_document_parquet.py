"""Documents on disk: the same out as in, the same bytes twice, never half a file that looks whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import BadData
from tokenization.document import Document
from tokenization.shards.document_parquet import (
    provenance_column,
    read_documents,
    to_batches,
    write_batches,
    write_documents,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def any_document(draw: st.DrawFn) -> Document:
    tokens = np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=20)), dtype=np.int32)
    edges = sorted(draw(st.sets(st.integers(0, len(tokens)), max_size=6)))
    spans = tuple(zip(edges[::2], edges[1::2]))
    return Document(draw(st.text()), draw(st.text()), tokens, spans, draw(st.dictionaries(st.text(), JSON, max_size=3)))


def documents(count: int, length: int) -> Iterator[Document]:
    rng = np.random.default_rng(0)
    for n in range(count):
        tokens = rng.integers(0, 40_000, length, dtype=np.int32)
        yield Document(f"play/{n}", "plays", tokens, ((1, length),), {"url": f"s3://b/{n}.txt", "times": [0.25 * n]})


def written(items: list[Document], **options: int) -> bytes:
    file = io.BytesIO()
    assert write_documents(file, iter(items), **options) == len(items)
    return file.getvalue()


def assert_same(left: Document, right: Document) -> None:
    assert (left.key, left.source, left.loss_spans) == (right.key, right.source, right.loss_spans)
    assert dict(left.provenance) == dict(right.provenance)
    assert left.tokens.dtype == np.int32
    np.testing.assert_array_equal(left.tokens, right.tokens)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(any_document(), max_size=8), st.integers(1, 40))
def test_documents_come_back_as_they_were_whatever_the_row_groups(items: list[Document], tokens: int) -> None:
    back = list(read_documents(io.BytesIO(written(items, row_group_tokens=tokens))))
    assert len(back) == len(items)
    for got, item in zip(back, items):
        assert_same(got, item)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 29)), st.integers(1, 400))
def test_any_rows_are_those_documents(rows: set[int], tokens: int) -> None:
    items = list(documents(30, 20))
    back = list(read_documents(io.BytesIO(written(items, row_group_tokens=tokens)), rows))
    assert [document.key for document in back] == [items[row].key for row in sorted(rows)]
    for got, row in zip(back, sorted(rows)):
        assert_same(got, items[row])


def test_of_row_groups_without_wanted_rows_nothing_is_read() -> None:
    class Counted(io.BytesIO):
        n_read = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.n_read += len(data)
            return data

    file = Counted(written(list(documents(200, 1000)), row_group_tokens=1000))
    assert len(list(read_documents(file, [70, 71]))) == 2
    assert file.n_read < len(file.getvalue()) / 2


def test_the_same_documents_make_the_same_bytes() -> None:
    first, second = (written(list(documents(300, 1000)), row_group_tokens=1 << 16) for _ in range(2))
    assert first == second
    reordered = [
        Document(d.key, d.source, d.tokens, d.loss_spans, dict(reversed(d.provenance.items())))
        for d in documents(300, 1000)
    ]
    assert written(reordered, row_group_tokens=1 << 16) == first  # the order of provenance keys is no difference


@given(st.lists(st.integers(0, 40), max_size=30), st.lists(st.integers(1, 9), max_size=9), st.integers(1, 60))
def test_the_same_documents_make_the_same_bytes_wherever_their_batches_end(
    lengths: list[int], sizes: list[int], tokens: int
) -> None:
    items = [next(documents(1, length)) for length in lengths]
    ends = [*np.cumsum(sizes).tolist(), len(items)]
    batches = [batch for start, end in zip([0, *ends], ends) for batch in to_batches(items[start:end])]
    file = io.BytesIO()
    assert write_batches(file, batches, row_group_tokens=tokens) == len(items)
    assert file.getvalue() == written(items, row_group_tokens=tokens)


@given(st.dictionaries(st.text(max_size=9), JSON, max_size=4), st.text(max_size=9), st.lists(st.integers(0, 2**40)))
def test_provenance_of_a_column_is_written_as_that_of_each(same: dict[str, Any], name: str, numbers: list[int]) -> None:
    same.pop(name, None)
    column = provenance_column(same, name, pa.array(numbers, pa.int64()))
    expected = [json.dumps({**same, name: n}, sort_keys=True, separators=(",", ":")) for n in numbers]
    assert column.to_pylist() == expected


def test_row_groups_are_bounded_by_tokens_and_a_longer_document_has_its_own() -> None:
    items = [*documents(5, 100), *documents(1, 5000), *documents(5, 100)]
    metadata = pq.ParquetFile(io.BytesIO(written(items, row_group_tokens=250))).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 2, 1, 1, 2, 2, 1]


def test_many_empty_documents_do_not_make_one_endless_row_group() -> None:
    metadata = pq.ParquetFile(io.BytesIO(written(list(documents(40_000, 0))))).metadata
    assert max(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)) <= 1 << 14


def test_writing_takes_documents_only_as_row_groups_fill() -> None:
    file = io.BytesIO()
    sizes = []

    def watched() -> Iterator[Document]:
        for document in documents(40, 1000):
            sizes.append(file.tell())
            yield document

    write_documents(file, watched(), row_group_tokens=4000)
    assert len(set(sizes)) >= 9  # the file grew while documents were still coming


def test_reading_holds_one_row_group() -> None:
    file = io.BytesIO(written(list(documents(200, 50_000)), row_group_tokens=100_000))
    before, most = pa.total_allocated_bytes(), 0
    for document in read_documents(file):
        assert document.tokens.base is None  # owns its memory
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 4 * 100_000 * 4 < 200 * 50_000 * 4


def test_plain_parquet_readers_see_plain_columns() -> None:
    table = pq.read_table(io.BytesIO(written(list(documents(2, 3)))))
    assert table.column_names == ["key", "source", "tokens", "loss_spans", "provenance"]
    row: dict[str, Any] = table.to_pylist()[1]
    assert row["loss_spans"] == [{"start": 1, "end": 3}]
    assert row["provenance"] == '{"times":[0.25],"url":"s3://b/1.txt"}'


def test_an_interrupted_write_leaves_nothing_that_looks_whole() -> None:
    def failing() -> Iterator[Document]:
        yield from documents(10, 100)
        raise RuntimeError("decoder died")

    file = io.BytesIO()
    with pytest.raises(RuntimeError, match="decoder died"):
        write_documents(file, failing(), row_group_tokens=200)
    with pytest.raises(BadData, match="not a whole file of documents"):
        list(read_documents(io.BytesIO(file.getvalue())))


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_a_truncated_file_is_bad_data(keep: float) -> None:
    whole = written(list(documents(50, 500)))
    cut = whole[: int(keep if keep > 1 else keep * len(whole))]
    with pytest.raises(BadData, match="not a whole file of documents"):
        list(read_documents(io.BytesIO(cut)))


def test_a_damaged_page_is_bad_data() -> None:
    whole = bytearray(written(list(documents(50, 500))))
    whole[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    with pytest.raises(BadData):
        list(read_documents(io.BytesIO(bytes(whole))))


def test_other_parquet_is_bad_data() -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    file.seek(0)
    with pytest.raises(BadData, match="its columns are text"):
        list(read_documents(file))


def test_a_file_that_cannot_seek_can_be_written() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.parts: list[bytes] = []
            self.closed = False

        def write(self, data: bytes) -> int:
            self.parts.append(bytes(data))
            return len(data)

        def flush(self) -> None:
            pass

    pipe = Pipe()
    write_documents(pipe, documents(5, 100))  # type: ignore[arg-type]
    assert not pipe.closed
    assert len(list(read_documents(io.BytesIO(b"".join(pipe.parts))))) == 5
