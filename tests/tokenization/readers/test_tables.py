"""Tables as people and other programs write them: quoted, compressed, with columns that nobody asked for."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadData
from tokenization.readers.compressed import CODECS, unpacked
from tokenization.readers.record import BadRecord
from tokenization.readers.records import extension_of, read_records


def read(content: bytes, url: str, columns: list[str] | None = None, **options: int) -> list[Any]:
    return list(read_records(io.BytesIO(content), url, columns, **options))


def compressed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


# --- CSV and TSV ---

CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", "\t"]), st.booleans())
def test_rows_are_those_that_were_written(rows: list[tuple[str, str]], mark: str, is_marked: bool) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=mark, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "text"), *rows])
    content = b"\xef\xbb\xbf" * is_marked + file.getvalue().encode()
    assert read(content, "x.tsv" if mark == "\t" else "x.csv") == [
        (number, {"a": one, "text": other}) for number, (one, other) in enumerate(rows)
    ]


def test_a_bad_row_costs_itself_and_columns_that_nobody_asked_for_cost_nothing() -> None:
    content = b'id,text,id\n1,"two\nlines, one value",x\n2,short\n3,caf\xe9,x\n4,a\0b,x\n\n5,"a ""b""",x\n'
    found = read(content, "a.csv", ["text"])
    assert found == [
        (0, {"text": "two\nlines, one value"}),
        BadRecord(1, "row 1: 2 values, where the first row has 3"),
        BadRecord(2, "row 2: not UTF-8: byte 0xe9"),
        BadRecord(3, "row 3: not text: a NUL byte"),
        (5, {"text": 'a "b"'}),
    ]
    with pytest.raises(BadData, match='the column "id" occurs twice'):
        read(content, "a.csv", ["id"])
    with pytest.raises(BadData, match="its first row, which is to name the columns, cannot be read: not UTF-8"):
        read(b"caf\xe9\n1\n", "a.csv")
    assert read(b"", "a.csv") == [BadRecord(0, "the file is empty")]
    assert read(b"text\n", "a.csv") == []


@pytest.mark.parametrize("end", [2, 8, 14])
def test_a_table_that_is_cut_off_inside_a_quoted_value_does_not_end_in_half_of_it(end: int) -> None:
    whole = b'text\nfine\n"a value\nof two lines"\n'
    assert read(whole, "a.csv") == [(0, {"text": "fine"}), (1, {"text": "a value\nof two lines"})]
    reason = "row 1: the file ends in a value whose quotes are not closed"
    assert read(whole[:-end], "a.csv") == [(0, {"text": "fine"}), BadRecord(1, reason)]
    with pytest.raises(BadData, match=r"its first row.*the file ends in a value whose quotes are not closed"):
        read(b'id,"te', "a.csv")


def test_a_quote_that_is_never_closed_and_a_line_without_end_cost_their_rows_in_bounded_memory() -> None:
    long = b"text\n" + b"x" * 5000 + b"\nfine\n"
    assert read(long, "a.csv", max_record_bytes=1000) == [
        BadRecord(0, "row 0: longer than 1000 bytes, the most for one record"),
        (1, {"text": "fine"}),
    ]
    found = read(b'text\n"open\n' + b"x\n" * 2000, "a.csv", max_record_bytes=1000)
    assert isinstance(found[0], BadRecord)
    assert "field larger than field limit (1000)" in found[0].reason
    assert found[-1][1] == {"text": "x"}


# --- Compressed ---


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("plain", [".txt", ".md", ".jsonl", ".csv", ".tsv"])
def test_a_compressed_file_is_its_content(codec: str, plain: str) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n' if plain == ".jsonl" else b"text\none\ntwo\n"
    packed = {"gzip": ".gz", "zstd": ".zst"}[codec]
    assert read(compressed(content, codec), f"s3://b/A{plain}{packed}") == read(content, f"a{plain}")
    assert extension_of(f"https://h/A{plain.upper()}{packed}?v=1") == plain + packed
    members = compressed(content[:16], codec) + compressed(content[16:], codec)  # as pigz and zstd -T write them
    assert read(members, f"a{plain}{packed}") == read(content, f"a{plain}")


@pytest.mark.parametrize(("codec", "url"), [("gzip", "a.jsonl.gz"), ("zstd", "a.jsonl.zst")])
def test_what_is_cut_or_damaged_keeps_the_records_before_and_says_so(codec: str, url: str) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(300_000))
    whole = compressed(lines, codec)
    found: list[Any] = []
    with pytest.raises(BadData, match=f"its compression by {codec} is damaged"):
        found.extend(read_records(io.BytesIO(whole[: len(whole) // 2]), url))
    assert found[:2] == [(0, {"text": "0"}), (1, {"text": "1"})]
    with pytest.raises(BadData, match=f"its compression by {codec} is damaged"):
        read(b'{"text": "not compressed"}\n', url)


@settings(max_examples=30)
@given(cut=st.integers(1, 1200))
def test_a_gzip_that_is_cut_keeps_every_record_whose_end_is_there(cut: int) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number**3 for number in range(500))
    part = gzip.compress(lines, mtime=0)[:-cut]
    there = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(part).count(b"\n")
    found: list[Any] = []
    with pytest.raises(BadData, match="its compression by gzip is damaged"):
        found.extend(read_records(io.BytesIO(part), "a.jsonl.gz"))
    assert found == [(number, {"text": str(number**3)}) for number in range(there)]


def test_a_gzip_stream_that_is_damaged_costs_itself_and_what_follows() -> None:
    streams = [bytearray(gzip.compress(b'{"n": %d}\n' % number * 99, mtime=0)) for number in range(3)]
    streams[1][-5] ^= 1  # of its checksum
    found: list[Any] = []
    with pytest.raises(BadData, match="its compression by gzip is damaged"):
        found.extend(read_records(io.BytesIO(b"".join(streams)), "a.jsonl.gz"))
    assert found == [(number, {"n": 0}) for number in range(99)]


@pytest.mark.parametrize("zeros", [1, 511, 1 << 16, 3 << 16])
def test_zeros_behind_a_gzip_stream_are_no_data(zeros: int) -> None:
    first, second = (gzip.compress(line, mtime=0) for line in (b'{"n": 1}\n', b'{"n": 2}\n'))
    assert read(first + bytes(zeros), "a.jsonl.gz") == [(0, {"n": 1})]
    assert read(first + bytes(zeros) + second, "a.jsonl.gz") == [(0, {"n": 1}), (1, {"n": 2})]
    found: list[Any] = []
    with pytest.raises(BadData, match="its compression by gzip is damaged"):
        found.extend(read_records(io.BytesIO(first + bytes(zeros) + b"more"), "a.jsonl.gz"))
    assert found == [(0, {"n": 1})]


@pytest.mark.parametrize(("packed", "codec"), CODECS.items())
def test_what_is_unpacked_comes_in_pieces_of_the_size_that_is_asked_for(packed: str, codec: str) -> None:
    content = bytes(range(256)) * 1000
    read = unpacked(io.BytesIO(compressed(content, codec)), codec)
    pieces = [read(size) for size in (1, 1000, 70_000)]
    assert [len(piece) for piece in pieces] <= [1, 1000, 70_000]
    while piece := read(1 << 20):
        pieces.append(piece)
    assert b"".join(pieces) == content


def test_a_bomb_is_read_past_in_little_memory() -> None:
    bomb = gzip.compress(bytes(1 << 20)) * 300
    (found,) = read(bomb, "a.jsonl.gz", max_record_bytes=1 << 20)
    assert found == BadRecord(0, "line 1: longer than 1048576 bytes, the most for one record")


# --- Parquet's columns ---


def test_columns_that_no_field_names_may_hold_anything() -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    table = pa.table(
        {
            "text": ["fine"],
            "date": far,
            "zone": pa.array([0], pa.timestamp("us", tz="Mars/Olympus")),
            "lasts": pa.array([2**62], pa.duration("us")),
            "bytes": pa.array([b"\xff"]).view(pa.string()),
            "twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]),
            "day": pa.array([datetime.date(2026, 1, 1)]),
        }
    )
    assert read(parquet(table), "a.parquet", ["text"]) == [(0, {"text": "fine"})]


def test_a_named_column_costs_the_rows_that_cannot_be_read_and_no_other() -> None:
    dates = pa.array([0, 2**62, 1], pa.timestamp("us"))
    first, second, third = read(
        parquet(pa.table({"text": ["a", "b", "c"], "date": dates})), "a.parquet", ["text", "date"]
    )
    assert first[1]["text"] == "a"
    assert isinstance(second, BadRecord)
    assert 'row 1: the column "date" cannot be read' in second.reason
    assert third[0] == 2


def test_a_named_column_whose_time_zone_is_unknown_costs_its_rows() -> None:
    times = pa.array([0, None], pa.timestamp("us", tz="Mars/Olympus"))
    first, second = read(parquet(pa.table({"text": ["a", "b"], "when": times})), "a.parquet", ["text", "when"])
    assert isinstance(first, BadRecord)
    assert 'row 0: the column "when" cannot be read' in first.reason
    assert second == (1, {"text": "b", "when": None})


def test_a_file_without_any_of_the_columns_is_told_once() -> None:
    table = pa.table({"content": ["a"] * 1000})
    with pytest.raises(BadData, match=r"it has no column 'text' or 'caption', but 'content'"):
        read(parquet(table), "a.parquet", ["text", "caption"])


def test_large_and_encoded_text_is_text(tmp_path: Path) -> None:
    values = ["one", None, "two"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(values, pa.string()).cast(kind)})
        assert [fields["text"] for _, fields in read(parquet(table), "a.parquet", ["text"])] == values
