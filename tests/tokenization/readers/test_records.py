"""Raw records from text-like files: streamed, bounded, a bad one costing only itself."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadData, UserError
from tokenization.readers.records import READ_BYTES, BadRecord, read_records


def read(content: bytes, url: str, **options: int) -> list[Any]:
    return list(read_records(io.BytesIO(content), url, **options))


def parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


class Lines(io.RawIOBase):
    """An endless file, made as it is read: parts in a cycle until `size` bytes."""

    def __init__(self, size: int, first: bytes = b"", last: bytes = b"") -> None:
        self.left, self.first, self.last = size, first, last

    def read(self, size: int = -1) -> bytes:
        if self.first:
            part, self.first = self.first, b""
            return part
        part = b"x" * min(size, self.left)
        self.left -= len(part)
        if not part:
            part, self.last = self.last, b""
        return part


# A file is a record


@pytest.mark.parametrize("url", ["s3://bucket/a.txt", "plays/Hamlet.MD", "https://host/a.md?version=2#top"])
def test_a_text_file_is_one_record(url: str) -> None:
    text = "To be, or not to be\r\n\u2014 \u65e5\u672c\U0001f642\n"
    assert read(text.encode(), url) == [(0, {"text": text})]
    assert read(text.encode("utf-8-sig"), url) == [(0, {"text": text})]  # the mark is no text


def test_text_that_is_not_utf8_is_bad_data_with_its_place() -> None:
    with pytest.raises(BadData, match="not UTF-8: byte 0xe9 at offset 3"):
        read(b"caf\xe9", "a.txt")
    with pytest.raises(BadData, match="not UTF-8: byte 0xff at offset 0"):
        read("text".encode("utf-16"), "a.txt")


def test_a_text_file_over_the_bound_is_bad_data_before_it_is_read_whole() -> None:
    assert read(b"x" * 100, "a.txt", max_record_bytes=100) == [(0, {"text": "x" * 100})]
    endless = Lines(1 << 40)
    with pytest.raises(BadData, match="larger than 3000000 bytes"):
        list(read_records(endless, "a.txt", max_record_bytes=3_000_000))
    assert (1 << 40) - endless.left == 3_000_001


# A line is a record


def test_json_lines_are_records_numbered_by_their_line() -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}\n{"a": [2]}'
    assert read(content, "a.jsonl") == [(0, {"a": 1}), (3, {"a": "\u00e9"}), (4, {"a": [2]})]
    assert read(b"\n \n", "a.jsonl") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "line 2: broken JSON"),
        (b"[1, 2]", "line 2: the JSON is list, not an object"),
        (b"null", "line 2: the JSON is NoneType, not an object"),
        (b'{"a": "\xff"}', "line 2: not UTF-8: byte 0xff at offset 7"),
        (b'{"a": 1} {"a": 2}', "line 2: broken JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', 'line 2: the key "a" occurs twice'),
        (b'{"a": {"b" : 1, "b" : 2}}', 'line 2: the key "b" occurs twice'),
        (b'{"a": "x\0y"}', "line 2: not text: a NUL byte at offset 8"),
        (b"[" * 100_000, "line 2: broken JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2: broken JSON"),
        (b'{"a": "' + b"x" * 200_000 + b'"}', "line 2: longer than 150000 bytes"),
    ],
)
def test_a_bad_line_costs_itself_alone(line: bytes, reason: str) -> None:
    first, bad, last = read(b'{"n": 1}\n' + line + b'\n{"n": 3}\n', "a.jsonl", max_record_bytes=150_000)
    assert (first, last) == ((0, {"n": 1}), (2, {"n": 3}))
    assert isinstance(bad, BadRecord)
    assert bad.index == 1
    assert bad.reason.startswith(reason)


STRINGS = st.sampled_from(
    ['"a"', '"\\u0061"', '"a:"', '"a\\u003a"', '"b\\":"', '"\\ud800"', '"\u00e9: :"', '"\t"', '""']
)
OTHERS = [
    "1",
    "-0",
    "1.5",
    "1e400",
    "NaN",
    "123456789012345678901",
    "9" * 5000,
    "true",
    "null",
    "01",
    "[1]",
    '{"a":1}',
    "",
    ":",
]
PAIRS = st.tuples(STRINGS, st.sampled_from([":", ": ", " :", "\t:\r"]), STRINGS | st.sampled_from(OTHERS))
LINES = st.tuples(
    st.sampled_from(["", " ", "\ufeff", "\x0c"]),
    st.lists(PAIRS.map("".join), max_size=3).map(",".join),
    st.sampled_from(["", "\r", "x", ",", "{}"]),
)


@settings(max_examples=500, deadline=None)
@given(LINES)
def test_a_line_is_what_pythons_json_makes_of_it_and_a_key_that_occurs_twice_is_bad(
    parts: tuple[str, str, str],
) -> None:
    before, inside, after = parts
    line = f"{before}{{{inside}}}{after}"
    _, found = read(f"{{}}\n{line}\n".encode(), "a.jsonl")
    pairs = pairs_of(line.strip(" \t\r\n"))
    if pairs is None or len(dict(pairs)) < len(pairs):
        assert isinstance(found, BadRecord)
        assert "broken JSON (" in found.reason or found.reason.endswith("occurs twice")
    else:
        assert repr(found) == repr((1, json.loads(line.strip(" \t\r\n"))))


def pairs_of(text: str) -> list[tuple[str, Any]] | None:
    """Keys and values of a JSON object, None where it is none."""
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        return None
    return pairs


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 9), st.booleans())
def test_lines_are_the_same_wherever_the_reads_fall(lengths: list[int], size: int, ended: bool) -> None:
    class Dribble(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            return super().read(size)

    lines = [json.dumps({"a": "x" * length}).encode() for length in lengths]
    content = b"\n".join(lines) + b"\n" * ended
    expected = [
        (n, json.loads(line))
        if len(line) <= 25
        else BadRecord(n, f"line {n + 1}: longer than 25 bytes, the most for one record")
        for n, line in enumerate(lines)
    ]
    expected = expected or [BadRecord(0, "the file is empty")] * (not content)
    assert list(read_records(Dribble(content), "a.jsonl", max_record_bytes=25)) == expected


def test_a_line_of_a_hundred_megabytes_is_read_past_in_little_memory() -> None:
    file = Lines(100_000_000, first=b'{"n": 0}\n', last=b'\n{"n": 2}\n')
    tracemalloc.start()
    try:
        records = list(read_records(file, "a.jsonl", max_record_bytes=4 << 20))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert records[0] == (0, {"n": 0})
    assert records[1] == BadRecord(1, "line 2: longer than 4194304 bytes, the most for one record")
    assert records[2] == (2, {"n": 2})
    assert most < 3 * (4 << 20) + 8 * READ_BYTES


def test_records_come_while_the_file_is_still_being_read() -> None:
    file = Lines(1 << 40, first=b'{"n": 0}\n{"n": 1}\n')
    records = read_records(file, "a.jsonl")
    assert [next(records), next(records)] == [(0, {"n": 0}), (1, {"n": 1})]
    assert file.left == 1 << 40


# A row is a record


def test_parquet_rows_are_records_across_row_groups() -> None:
    rows = [{"text": f"row {n}", "vision": [[n, 1], [2, 3]], "score": None if n % 2 else 0.5} for n in range(250)]
    content = parquet(pa.Table.from_pylist(rows), row_group_size=100)
    assert read(content, "s3://b/a.parquet") == list(enumerate(rows))


def test_a_parquet_file_of_no_rows_has_no_records() -> None:
    assert read(parquet(pa.table({"text": pa.array([], pa.string())})), "a.parquet") == []


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_page_of_parquet_whose_checksum_is_wrong_costs_its_row_group(version: str) -> None:
    options = {"write_page_checksum": True, "data_page_version": version, "use_dictionary": False}
    table = pa.table({"text": [f"row {number}" for number in range(20)]})
    whole = parquet(table, row_group_size=10, compression="none", **options)
    assert len(read(whole, "a.parquet")) == 20
    bad, *good = read(whole.replace(b"row 3", b"rew 3"), "a.parquet")
    assert isinstance(bad, BadRecord)
    assert (bad.index, bad.reason.partition(" (")[0]) == (0, "rows 0 to 9 are unreadable")
    assert good == [(number, {"text": f"row {number}"}) for number in range(10, 20)]


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.999])
def test_a_truncated_parquet_is_bad_data(keep: float) -> None:
    whole = parquet(pa.table({"text": [f"row {n}" for n in range(1000)]}))
    with pytest.raises(BadData, match="not a whole Parquet file"):
        read(whole[: int(keep if keep >= 1 else keep * len(whole))], "a.parquet")


def test_a_damaged_row_group_costs_its_rows_alone() -> None:
    table = pa.table({"text": [f"{n:09d}" for n in range(300)]})
    whole = bytearray(parquet(table, row_group_size=100, compression="zstd", use_dictionary=False))
    column = pq.ParquetFile(io.BytesIO(bytes(whole))).metadata.row_group(1).column(0)
    start = column.data_page_offset
    whole[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    records = read(bytes(whole), "a.parquet")
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert [record.index for record in bad] == [100]
    assert bad[0].reason.startswith("rows 100 to 199 are unreadable")
    good = [record for record in records if not isinstance(record, BadRecord)]
    assert [index for index, _ in good] == [*range(100), *range(200, 300)]
    assert good[100] == (200, {"text": "000000200"})


def test_a_bad_row_costs_itself_alone() -> None:
    text = pa.array([b"fine", b"caf\xe9", b"x" * 5000, b"fine too"]).view(
        pa.string()
    )  # strings are trusted to be UTF-8
    records = read(parquet(pa.table({"text": text})), "a.parquet", max_record_bytes=4096)
    assert records[0] == (0, {"text": "fine"})
    assert isinstance(records[1], BadRecord)
    assert records[1].reason == 'row 1: the column "text" is not UTF-8: byte 0xe9 at offset 3'
    assert records[2] == BadRecord(2, "row 2: larger than 4096 bytes, the most for one record")
    assert records[3] == (3, {"text": "fine too"})


@pytest.mark.parametrize("url", ["a.xml", "s3://bucket/noextension", "a.tar.gz"])
def test_an_unknown_extension_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match=r"\.txt, \.md, \.jsonl, \.csv, \.tsv, \.parquet"):
        read_records(io.BytesIO(b""), url)
