"""Side data is found by whatever its key names: a URL, a path, its end, or a name without its extension."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import UserError
from tokenization.readers.records import read_records
from tokenization.readers.side_data import SideData


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def side(*rows: dict[str, Any], url: str = "captions.jsonl") -> SideData:
    content = io.BytesIO("\n".join(json.dumps(row) for row in rows).encode())
    return SideData.load([(url, read_records(content, url))])


def found(table: SideData, url: str) -> dict[str, Any]:
    return json.loads(table.row(url) or "{}")


def test_side_data_is_found_by_stem_name_or_path() -> None:
    table = side({"key": "bikes", "caption": "two bikes"}, {"file": "clips/bunny.mp4", "caption": "a bunny", "n": 1})
    for url in ("bikes", "s3://bucket/clips/bikes.mp4", "/data/bikes.avi", "https://host/bikes.mp4?token=a/b.c"):
        assert found(table, url) == {"caption": "two bikes"}
    assert found(table, "s3://bucket/clips/bunny.mp4") == {"caption": "a bunny", "n": 1}
    assert found(table, "s3://bucket/others/bunny.mp4") == {}
    assert len(table) == 2


def test_the_longest_key_wins_so_that_equal_names_can_be_told_apart() -> None:
    table = side(
        {"key": "a", "c": 0}, {"key": "x/a", "c": 1}, {"key": "s3://b/y/a.mp4", "c": 2}, {"key": "v.2", "c": 3}
    )
    rows = [found(table, url).get("c") for url in ("s3://b/z/a.mp4", "s3://b/x/a.mp4", "s3://b/y/a.mp4", "/v.2.mp4")]
    assert rows == [0, 1, 2, 3]


def test_side_data_of_parquet_and_several_files_with_bad_rows_listed(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"file": ["a.mp4"], "question": ["who?"], "answer": ["me"]})))
    (tmp_path / "b.jsonl").write_bytes(b'{"key": 7, "caption": "seven"}\n{broken\n')
    files = [(str(path), io.BytesIO(path.read_bytes())) for path in sorted(tmp_path.iterdir())]
    table = SideData.load((path, read_records(file, path)) for path, file in files)
    assert found(table, "a.mp4") == {"question": "who?", "answer": "me"}
    assert found(table, "dir/7.png") == {"caption": "seven"}
    assert [(Path(url).name, bad.index) for url, bad in table.bad] == [("b.jsonl", 1)]


def test_a_row_without_key_or_with_a_repeated_one_is_the_users_mistake() -> None:
    with pytest.raises(
        UserError, match=r"captions\.jsonl: row 0 has no key; give every row a `key` or a `file` column"
    ):
        side({"caption": "two bikes"})
    with pytest.raises(UserError, match=r'captions\.jsonl: row 1 repeats the key "a"'):
        side({"key": "a"}, {"key": "a"})
