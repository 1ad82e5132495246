"""A tar of raw media gives its samples as webdataset would, whatever its members are called, wherever it is damaged."""

from __future__ import annotations

import io
import json
import tarfile
import weakref
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from testing.made_tars import tar
from tokenization.readers import webdataset_tar as tar_samples
from tokenization.readers.webdataset_tar import BLOCK, BadSample, Sample, _split, read_samples


def bytes_of(sample: Sample, file: io.BytesIO) -> bytes:
    """The medium's bytes."""
    file.seek(sample.offset)
    return file.read(sample.size)


def samples(content: bytes, **options: Any) -> list[tuple[Any, ...]]:
    """What is read, with each medium's bytes."""
    found: list[tuple[Any, ...]] = []
    for sample in read_samples(io.BytesIO(content), **options):
        if isinstance(sample, Sample):
            medium = bytes_of(sample, io.BytesIO(content))
            found.append((sample.number, sample.key, sample.member, sample.kind, medium, sample.side))
        else:
            found.append((sample.number, sample.key, sample.reason))
    return found


def test_the_members_of_one_key_are_a_sample_with_its_json_and_its_caption() -> None:
    content = tar(
        [
            ("000.jpg", b"picture 0"),
            ("000.json", json.dumps({"caption": "of the json", "width": 3}).encode()),
            ("000.txt", "café\n".encode()),
            ("001.json", b"{}"),
            ("001.mp4", b"film 1"),
            ("002.jpg", b"thumbnail 2"),
            ("002.m4a", b"its sound"),
            ("002.webm", b"film 2"),
            ("deep/003.JPG", b"picture 3"),
        ]
    )
    assert samples(content) == [
        (0, "000", "000.jpg", "image", b"picture 0", {"caption": "café", "width": 3}),
        (1, "001", "001.mp4", "video", b"film 1", {}),
        (2, "002", "002.webm", "video", b"film 2", {}),
        (3, "deep/003", "deep/003.JPG", "image", b"picture 3", {}),
    ]


@given(st.from_regex(r"([a-z._-]{1,5}/){0,2}[a-z_-]{1,4}(\.[A-Za-z0-9]{1,4}){1,3}", fullmatch=True))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    key, extension = _split(name)
    assert (key, extension) == (base_plus_ext(name)[0].removeprefix("./"), base_plus_ext(name)[1].lower())


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/../../x", "C:\\x", "x" * 300, "é\udcff", "a b\nc"])
def test_a_name_is_a_key_and_nothing_else(name: str) -> None:
    (found,) = samples(tar([(f"{name}.jpg", b"1"), (f"{name}.txt", b"2")]))
    assert found[1] == name.replace("\udcff", "\ufffd")
    assert found[4:] == (b"1", {"caption": "2"})


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.json", b"{}"), ("x.npy", b"")], "no video or image in it, only .json, .npy"),
        ([("x.heic", b"")], "no video or image in it, only .heic"),
        ([("x.jpg", b"1"), ("x.json", b"{")], "its .json cannot be read"),
        ([("x.jpg", b"1"), ("x.json", b"[" * 10**5)], "its .json cannot be read"),
        ([("x.jpg", b"1"), ("x.json", b"[]")], "its .json is list, not an object"),
        ([("x.jpg", b"1"), ("x.json", b"9" * 300_001)], "its .json is larger than 300000 bytes"),
        ([("x.jpg", b"1"), ("x.txt", b"\xff\xfe")], "its .txt cannot be read: not UTF-8: byte 0xff at offset 0"),
        ([("x.jpg", b"1"), ("x.jpg", b"2")], "two members have the extension .jpg"),
        ([link("x.jpg", tarfile.SYMTYPE)], "its member .jpg is no plain file"),
        ([link("x.jpg", tarfile.LNKTYPE), ("x.txt", b"")], "its member .jpg is no plain file"),
        ([link("x.jpg", tarfile.CHRTYPE)], "its member .jpg is no plain file"),
    ],
)
def test_a_sample_that_cannot_be_used_costs_itself(members: list[Any], reason: str) -> None:
    found = samples(tar([("a.jpg", b"A"), *members, ("z.jpg", b"Z")]), max_record_bytes=300_000)
    assert [one[:2] for one in found][::2] == [(0, "a"), (2, "z")]
    assert found[1][0] == 1
    assert found[1][2].startswith(reason)


def test_a_key_that_comes_back_later_is_refused_and_folders_are_no_samples() -> None:
    content = tar([link("a", tarfile.DIRTYPE), ("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    assert [(one[1], one[-1]) for one in samples(content)] == [
        ("a", {}),
        ("b", {}),
        ("a", "its key occurs in the tar twice, with other samples between"),
    ]


WHOLE = [
    member
    for number in range(5)
    for member in (
        (f"{'long-' * 30}{number}.jpg", bytes([number]) * 700),
        (f"{'long-' * 30}{number}.txt", f"picture {number}".encode()),
    )
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_cut_anywhere_keeps_the_samples_before_and_says_once_that_the_rest_is_lost(form: int) -> None:
    content = tar(WHOLE, form)
    whole = samples(content)
    assert len(whole) == 5
    ends = content.rstrip(b"\0")
    for cut in range(0, len(ends) + BLOCK, 97):
        found = samples(content[:cut])
        *kept, last = found
        assert kept == whole[: len(kept)]
        assert last[1] is None
        assert last[0] == len(kept)
        assert last[2].startswith("the tar is damaged from ")
    assert samples(content[: len(content) - 10]) == whole, "the padding behind the mark of the end is nobody's"


@given(st.data())
def test_damage_anywhere_never_loses_a_sample_without_a_word(data: st.DataObject) -> None:
    content = bytearray(tar(WHOLE))
    whole = samples(bytes(content))
    place = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 2000))
    content[place : place + length] = data.draw(st.binary(min_size=1, max_size=1)) * len(
        content[place : place + length]
    )
    found = samples(bytes(content))
    told = [one for one in found if one[1] is None]
    assert len(told) <= 1
    if not told:
        assert len(found) >= len(whole)
    else:
        assert found[-1] == told[0]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 1000, bytes(100), b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_told_in_one_line(content: bytes) -> None:
    (found,) = samples(content)
    assert found[:2] == (0, None)
    assert found[2].startswith("the tar is damaged from its beginning: ")


@pytest.mark.parametrize(("codec", "open_as"), [("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz"), ("zstd", "")])
def test_a_compressed_tar_is_told_as_that(codec: str, open_as: Any) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=open_as or "w") as written:
        written.addfile(tarfile.TarInfo("a.jpg"))
    content = file.getvalue() if open_as else pa.compress(file.getvalue(), codec, asbytes=True)
    assert [one[2] for one in samples(content)] == [
        f"the tar is damaged from its beginning: it is compressed by {codec}; unpack it"
    ]


def test_any_number_of_empty_members_is_read() -> None:
    content = tar([link(str(number), tarfile.DIRTYPE) for number in range(3000)] + [("a.jpg", b"1")])
    assert [one[1] for one in samples(content)] == ["a"]


def test_an_archive_behind_the_end_mark_is_told() -> None:
    content = tar([("a.jpg", b"1")])
    found = samples(content + tar([("b.jpg", b"2")]))
    assert [one[1] for one in found] == [None]
    assert "more data follows its end mark" in found[0][2]


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + bytes(10) + b"\xff", b"\xff" * 12])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_header_that_claims_any_size_does_no_more_than_end_the_tar(size: bytes, kind: bytes) -> None:
    header = bytearray(tar([("b.jpg", b"")])[:BLOCK])
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    first = tar([("a.jpg", b"1")])[: 2 * BLOCK]
    found = samples(first + bytes(header) + b"\1" * 1000 + bytes(2 * BLOCK))
    assert found[-1][1] is None


@pytest.mark.parametrize(
    "name",
    [
        "README",
        "LICENSE",
        ".DS_Store",
        "._a.jpg",
        "deep/._a.txt",
        "__MACOSX/._a.jpg",
        "__MACOSX/a.jpg",
        "Thumbs.db",
        "ReadMe.md",
        "LICENCE.txt",
        "deep/readme.rst",
        ".hidden/.b.json",
        "metadata.csv",
        "deep/list.jsonl",
        "index.html",
        "checksums.md5",
    ],
)
def test_what_is_no_part_of_a_sample_is_passed_over_wherever_it_lies(name: str) -> None:
    wanted = [("a.jpg", b"1"), ("a.txt", b"one"), ("b.jpg", b"2"), ("b.json", b"{}")]
    expected = [("a", {"caption": "one"}), ("b", {})]
    for place in range(len(wanted) + 1):
        found = samples(tar([*wanted[:place], (name, b"Mac OS X"), *wanted[place:]]))
        assert [(one[1], one[-1]) for one in found] == expected


def test_a_medium_is_not_read() -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self.taken += len(content)
            return content

    file = Counting(tar([(f"{name}.jpg", bytes(10**5)) for name in "abcd"]))
    assert [one.key for one in read_samples(file)] == ["a", "b", "c", "d"]
    assert file.taken < 20_000


def test_a_bad_sample_has_a_reason() -> None:
    (found,) = read_samples(io.BytesIO(tar([("a.txt", b"")])))
    assert found == BadSample(0, "a", "no video or image in it, only .txt")


def test_a_sample_is_let_go_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Sample]] = []

    def read(*arguments: Any) -> Sample:
        assert not [one for one in made if one() is not None]
        sample = original(*arguments)
        made.append(weakref.ref(sample))
        return sample

    original = tar_samples._sample
    monkeypatch.setattr(tar_samples, "_sample", read)
    content = tar([(f"{number}.{kind}", b"x") for number in range(4) for kind in ("jpg", "txt")])
    for sample in read_samples(io.BytesIO(content)):
        del sample
    assert len(made) == 4
