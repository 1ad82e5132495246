"""Files of codes: the same out as in, a few row groups to an object, and nothing else is taken for one."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadData
from tokenization.codecs import codes_file
from tokenization.codecs.codes_file import ID_BYTES, SCHEMA, CodesFile, CodesWriter, MediumCodes, object_id

PER_FRAME = 16


def medium(name: str, member: str = "", frames: int = 3, seed: int = 0, per_frame: int = PER_FRAME) -> MediumCodes:
    """Every other sample of a video of twice as many."""
    codes = np.random.default_rng([seed, frames]).integers(0, 8192, (frames, per_frame), dtype=np.int32)
    numbers = np.arange(0, 2 * frames, 2)
    return MediumCodes(object_id(name, "e"), member, 2 * frames, numbers, numbers / 4, codes, f"encoder {seed}")


def written(rows: Iterable[MediumCodes]) -> bytes:
    file = io.BytesIO()
    writer = CodesWriter(file)
    for row in rows:
        writer.write(row)
    writer.close()
    return file.getvalue()


def opened(content: bytes) -> CodesFile:
    return CodesFile(io.BytesIO(content))


def assert_same(got: MediumCodes, row: MediumCodes) -> None:
    for entry in fields(MediumCodes):
        left, right = getattr(got, entry.name), getattr(row, entry.name)
        if isinstance(right, np.ndarray):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
        assert np.array_equal(left, right), entry.name


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of 6 frames."""
    monkeypatch.setattr(codes_file, "ROW_GROUP_CODES", 6 * PER_FRAME)


MEDIA = st.lists(
    st.builds(medium, st.sampled_from("abc"), st.text(max_size=4), st.integers(1, 9), st.integers(0, 3)), max_size=12
)


@settings(max_examples=40)
@given(MEDIA, st.integers(1, 400))
def test_media_come_back_as_they_were_whatever_the_row_groups(rows: list[MediumCodes], group: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes_file, "ROW_GROUP_CODES", group)
        content = written(rows)
    file = opened(content)
    back = list(file)
    assert len(back) == len(rows)
    for got, row in zip(back, rows):
        assert_same(got, row)
    assert sorted(file.objects) == sorted({row.object for row in rows})
    assert len(file.objects) == len(set(file.objects))


@pytest.mark.usefixtures("small_groups")
def test_only_the_row_groups_of_an_object_need_to_be_read() -> None:
    film = medium("film", "", 6)
    tar = [medium("tar", str(number), 2, number) for number in range(5)]
    last, late, end = medium("last", "", 1), medium("tar", "late", 1), medium("end", "", 2)
    file = opened(written([film, *tar, last, late, end]))
    groups = {name: file.groups_of(object_id(name, "e")) for name in ("film", "tar", "last", "end", "none")}
    assert groups == {"film": [0], "tar": [1, 2], "last": [2], "end": [3], "none": []}
    expected = [[film], tar[:3], [*tar[3:], last, late], [end]]
    for number, rows in enumerate(expected):
        assert file.members(number) == [(row.object, row.member) for row in rows]
        for got, row in zip(file.rows(number), rows, strict=True):
            assert_same(got, row)
    assert file.objects[0] == film.object
    assert set(file.objects) == {row.object for rows in expected for row in rows}


@pytest.mark.usefixtures("small_groups")
def test_the_writer_knows_its_objects_and_writes_as_row_groups_fill() -> None:
    file = io.BytesIO()
    writer = CodesWriter(file)
    assert writer.objects == []
    sizes = []
    for number in range(4):
        writer.write(medium(f"film {number // 2}", str(number), 3))
        sizes.append(file.tell())
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3], "two fill a group"
    writer.write(medium("more", "", 1))
    assert writer.objects == [object_id(name, "e") for name in ("film 0", "film 1", "more")]
    writer.close()
    assert not file.closed
    assert opened(file.getvalue()).objects == [object_id(name, "e") for name in ("film 0", "film 1", "more")]


def test_a_file_without_media_is_whole_too() -> None:
    file = opened(written([]))
    assert list(file) == file.objects == []


def test_the_same_media_make_the_same_bytes() -> None:
    rows = [medium("film", str(number), 5, number) for number in range(9)]
    assert written(rows) == written(rows)


def test_the_id_of_an_object_is_of_its_address_and_its_version() -> None:
    ids = {object_id(*named) for named in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("b", "b"))}
    assert len(ids) == 5
    assert {len(one) for one in ids} == {ID_BYTES}
    assert object_id("a", "b") == object_id("a", "b")
    assert len(object_id("a\udcff", "e")) == ID_BYTES, "names of bytes that are no text have one"


def read(content: bytes) -> list[MediumCodes]:
    """All that a reader of a file looks at."""
    file = opened(content)
    for group in range(file._parquet.num_row_groups):
        file.members(group)
    return list(file)


@pytest.mark.usefixtures("small_groups")
def test_a_file_that_was_cut_anywhere_is_refused() -> None:
    content = written([medium("film", "", 6), medium("other", "", 2)])
    for length in range(0, len(content), 7):
        with pytest.raises(BadData, match=r"^not a whole file of codes"):
            opened(content[:length])


@pytest.mark.usefixtures("small_groups")
def test_no_flipped_bit_of_a_page_gives_other_codes() -> None:
    """Each has a checksum, so that what is not refused is as it was written."""
    rows = [medium("film", "", 6), *(medium("tar", str(number), 2, number) for number in range(3))]
    content = written(rows)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused, places = 0, range(4, footer, 5)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        try:
            back = read(bytes(damaged))
        except BadData:
            refused += 1
            continue
        for got, row in zip(back, rows, strict=True):
            assert_same(got, row)
    assert refused > len(places) / 2


def test_other_files_are_refused() -> None:
    table = pa.table({"object": ["a"], "codes": [[1, 2]]})
    other, unlisted = io.BytesIO(), io.BytesIO()
    pq.write_table(table, other)
    pq.write_table(SCHEMA.empty_table(), unlisted)
    for content in (b"", b"PAR1", b"no Parquet at all, but a text that is long enough", other.getvalue()):
        with pytest.raises(BadData, match=r"^not a (whole )?file of codes"):
            opened(content)
    with pytest.raises(BadData, match=r"^not a whole file of codes"):
        opened(unlisted.getvalue())
