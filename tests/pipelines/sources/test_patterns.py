"""Which objects patterns find, what each is called, and what holds it out."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow.parquet as pq
import pytest

from pipelines.recipe import Recipe
from pipelines.sources.heldout import heldout_notes
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import OBJECTS, Listing, SourceObject, content_of, read_objects, write_objects
from storage.errors import UserError
from storage.store import Store
from testing.http_server import files_server
from testing.miniature import text_recipe
from testing.s3_server import ObjectStore


def recipe(
    data: Path | str, root: str = "/nowhere/run", options: Any = None, codes: str | None = None, **source: Any
) -> Recipe:
    tree = text_recipe(data, root)
    tree["storage"]["codes"] = codes
    tree["sources"] = {"a": {"urls": ["*"], **source}}
    tree["train"]["stages"][0]["mixture"] = {"a": 1}
    tree["storage"]["options"] = options or {}
    return Recipe.model_validate(tree)


def listing(data: Path | str, root: str = "/nowhere/run", options: Any = None, **more: Any) -> Listing:
    return list_sources(recipe(data, root, options, **more))


def keys(found: Sequence[SourceObject], heldout: bool | None = None) -> list[str]:
    return [one.key.removeprefix("a/") for one in found if heldout in (None, one.heldout)]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


@pytest.fixture(params=["disk", "bucket", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, object_store: ObjectStore) -> Iterator[Any]:
    """A function that puts texts of these names on one of three file systems, and a function that lists them."""
    folder = f"patterns/{uuid.uuid4()}"
    base = {"disk": str(tmp_path), "bucket": f"s3://data/{folder}", "memory": f"memory://{folder}"}[request.param]
    options = object_store.options if request.param == "bucket" else {}
    fs, root = fsspec.core.url_to_fs(base, **options)

    def lay_out(*names: str) -> Any:
        for name in names:
            fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            fs.pipe(f"{root}/{name}", f"text of {name}".encode())
        return lambda **source: listing(base, **{"options": options, **source})

    yield lay_out
    fs.rm(root, recursive=True)


def test_files_of_one_name_in_two_folders_are_two_objects(place: Any) -> None:
    found = place("2023/x.md", "2024/x.md")(urls=["2023/*.md", "2024/*.md"])
    assert keys(found) == ["2023/x.md", "2024/x.md"]


def test_what_several_patterns_find_is_one_object_held_out_if_any_pattern_says_so(place: Any) -> None:
    found = place("d/x.md", "d/y.md")(
        urls=["*/x.md", "d/*.md", "d/x.md", "**/*.md"], heldout=["*/none/*", "d/x.md"][1:]
    )
    assert keys(found, heldout=False) == ["d/y.md"]
    assert keys(found, heldout=True) == ["d/x.md"]


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("t/{00..02}.txt", ["t/00.txt", "t/01.txt", "t/02.txt"]),
        ("{t,u}/*.txt", ["t/00.txt", "t/01.txt", "t/02.txt", "u/B.TXT"]),
        ("t/*.{txt,md}", ["t/00.txt", "t/01.txt", "t/02.txt"]),
        ("v/clip[1].txt", ["v/clip[1].txt"]),
        ("v/{x}.txt", ["v/{x}.txt"]),
        ("u/*.txt", ["u/B.TXT"]),
        ("u", ["u/B.TXT"]),
        ("u/", ["u/B.TXT"]),
        ("**/0[01].txt", ["t/00.txt", "t/01.txt"]),
    ],
)
def test_patterns_name_the_same_objects_in_urls_and_in_heldout(place: Any, written: str, names: list[str]) -> None:
    listed = place(
        "t/00.txt", "t/01.txt", "t/02.txt", "u/B.TXT", "u/notes.xyz", "v/clip[1].txt", "v/clip1.txt", "v/{x}.txt"
    )
    assert keys(listed(urls=[written])) == names
    found = listed(urls=["**/*.txt"], heldout=[written])
    assert keys(found, heldout=True) == names
    assert len(found) == 7


@pytest.mark.parametrize("missing", ["t/{00..03}.txt", "t/[1].txt", "T/*.txt", "t/**.txt", "$NO_SUCH/x.txt"])
def test_a_pattern_that_names_nothing_is_refused_in_urls_and_in_heldout(tmp_path: Path, missing: str) -> None:
    fill(tmp_path, "t/00.txt", "t/01.txt", "t/02.txt")
    with pytest.raises(UserError, match=r"no such file or object|write it as a whole part"):
        listing(tmp_path, urls=[missing])
    if "**" not in missing:
        with pytest.raises(UserError, match=r"sources\.a\.heldout: .* names none of the 3 objects"):
            listing(tmp_path, urls=["t/*.txt"], heldout=[missing])


def test_a_whole_url_is_written_alike_in_urls_and_in_heldout(tmp_path: Path, object_store: ObjectStore) -> None:
    fill(tmp_path, "t/x.txt", "t/y.txt")
    for written in (f"file://{tmp_path}/t/x.txt", f"file://{tmp_path}/t/../t/x*", f"{tmp_path}/t//x.txt"):
        assert keys(listing(tmp_path, urls=[written])) == ["t/x.txt"]
        assert keys(listing(tmp_path, urls=["t/*.txt"], heldout=[written]), heldout=True) == ["t/x.txt"]
    fs, root = fsspec.core.url_to_fs("s3://data/whole-urls", **object_store.options)
    for name in "xy":
        fs.pipe_file(f"{root}/{name}.txt", name.encode())
    options = object_store.options
    found = listing("s3://data", options=options, urls=["whole-urls/*"], heldout=["s3a://data/whole-urls/x.txt"])
    assert keys(found, heldout=True) == ["whole-urls/x.txt"]


def test_the_place_of_the_data_is_no_pattern(tmp_path: Path) -> None:
    data = fill(tmp_path / "clips[1]", "x.txt", "y.txt")
    assert keys(listing(data, urls=["*.txt"], heldout=["y.*"]), heldout=True) == ["y.txt"]
    assert keys(listing(data, urls=["x.txt"])) == ["x.txt"]


def test_the_home_and_the_environment_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "x.txt", "y.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TEXTS", str(tmp_path))
    for written in ("~/*.txt", "$HOME/*.txt", "${TEXTS}/*.txt"):
        found = listing("/elsewhere", urls=[written], heldout=["~/x.txt"])
        assert [(one.url, one.heldout) for one in found] == [(f"{tmp_path}/x.txt", True), (f"{tmp_path}/y.txt", False)]
        assert found[0].key == f"a/{tmp_path}/x.txt"


def test_links_are_followed_and_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "real/x.txt", "data/y.txt", "data/held/z.txt")
    data = tmp_path / "data"
    (data / "linked").symlink_to(tmp_path / "real")
    (data / "loop").symlink_to(data)
    (data / "held" / "up").symlink_to(data)
    (data / "again.txt").symlink_to(data / "y.txt")
    (data / "gone.txt").symlink_to(data / "none.txt")
    assert keys(listing(data, urls=["*/*.txt"])) == ["held/z.txt", "linked/x.txt"]
    assert keys(listing(data, urls=["**/*.txt"])) == ["again.txt", "held/z.txt", "linked/x.txt"]
    found = listing(data, urls=["*.txt", "linked/*.txt"], heldout=["y.txt"])
    assert [(one.key, one.heldout) for one in found] == [("a/again.txt", True), ("a/linked/x.txt", False)]


def test_the_files_of_a_run_are_no_sources_of_it(place: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = place("x.jsonl", "run/stages/train/metrics.jsonl", "run/mine.jsonl")
    (one,) = listed(urls=["x.jsonl"])
    root = one.url.removesuffix("x.jsonl") + "run"
    caplog.set_level(logging.INFO)
    assert keys(listed(urls=["**/*.jsonl"], root=root)) == ["x.jsonl"]
    assert "2 objects in storage.root" in caplog.text
    assert keys(listed(urls=["run/**/*.jsonl"], root=root)) == ["run/mine.jsonl"]
    assert keys(listed(urls=["**/*.jsonl"], root=one.url.removesuffix("/x.jsonl"))) == [
        "run/mine.jsonl",
        "run/stages/train/metrics.jsonl",
        "x.jsonl",
    ]
    with pytest.raises(UserError, match=r"finds only files in .*run \(storage\.root\), where this run writes"):
        listed(urls=["run/stages/**/*.jsonl"], root=root)


def test_codes_are_no_sources_wherever_they_are_kept(place: Any) -> None:
    listed = place("x.jsonl", "shared/codes/0/data/y.jsonl")
    (one,) = listed(urls=["x.jsonl"])
    codes = one.url.removesuffix("x.jsonl") + "shared/codes"
    assert keys(listed(urls=["**/*.jsonl"], codes=codes)) == ["x.jsonl"]
    with pytest.raises(UserError, match=r"finds only files in .* \(storage\.root or storage\.codes\), where this run"):
        listed(urls=["shared/**/*.jsonl"], codes=codes)


def test_a_run_is_recognized_through_a_link(tmp_path: Path) -> None:
    fill(tmp_path, "data/x.jsonl", "disk/run/stages/a.jsonl")
    (tmp_path / "data/runs").symlink_to(tmp_path / "disk")
    assert keys(listing(tmp_path / "data", root=f"{tmp_path}/data/runs/run", urls=["**/*.jsonl"])) == ["x.jsonl"]


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("a.log", {"kind": "text"}, r"sources\.a: text is read from \.txt, .* and .*a\.log is none of these"),
        ("a.json", {}, "cannot tell the kind of .*a.json by its extension; set sources.a.kind to video, image or"),
        ("a.tar.gz", {}, "a.tar.gz is a compressed tar, which is not read; unpack it to a .tar"),
        ("a.tar.xz", {"kind": "webdataset"}, "a.tar.xz is a compressed tar, which is not read"),
        ("a.TGZ", {"kind": "webdataset"}, "a.TGZ is a compressed tar, which is not read"),
        ("a.txt.gz", {"media": "url"}, "a.txt.gz is no table"),
        ("x.jpg", {"side": ["x.jpg"]}, r"sources\.a\.side: .*x\.jpg is no table; side data is read from \.jsonl, "),
    ],
)
def test_a_file_that_its_source_cannot_read_is_named(
    tmp_path: Path, name: str, source: dict[str, Any], said: str
) -> None:
    fill(tmp_path, name)
    with pytest.raises(UserError, match=said):
        listing(tmp_path, urls=[name], **source)


def test_a_folder_of_side_data_is_its_tables(tmp_path: Path) -> None:
    fill(tmp_path, "x.jpg", "notes.txt")
    (tmp_path / "x.csv").write_text("file,caption\nx.jpg,c\n")
    (found,) = listing(tmp_path, urls=["x.jpg"], side=["."], fields=["caption"])
    assert found.side == {"caption": "c"}


def test_a_folder_without_a_known_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "d/x.xyz", "d/.hidden/x.txt")
    with pytest.raises(
        UserError, match=r"sources\.a\.urls: no file in the folder .*/d has an extension .*, as .*/d/\*"
    ):
        listing(tmp_path, urls=["d"])


def test_the_plan_says_how_many_objects_each_pattern_holds_out(tmp_path: Path) -> None:
    fill(tmp_path, "t/0.txt", "t/1.txt", "u/2.txt", "u/3.tar")
    made = recipe(tmp_path, urls=["**/*.txt"], heldout=["t/*", "*/2.txt"])
    assert heldout_notes(made, list_sources(made)) == (
        "sources.a.heldout t/*: 2 objects",
        "sources.a.heldout */2.txt: 1 object",
    )
    made = recipe(tmp_path, urls=["u/*.tar"], heldout=["u/eval-*"])
    assert heldout_notes(made, list_sources(made)) == (
        "sources.a.heldout u/eval-*: 0 objects, and what it names inside the others, which is seen when they are read",
    )
    with pytest.raises(UserError, match=r"sources\.a\.heldout: \*/4\.tar names none of the 1 object"):
        listing(tmp_path, urls=["u/*.tar"], heldout=["*/4.tar"])


def test_a_dead_web_server_is_told_from_a_missing_file(tmp_path: Path) -> None:
    fill(tmp_path, "x.txt")
    for written in ("x.txt", "*.txt", "sub/"):
        with pytest.raises(UserError, match=r"cannot be used \(.*[Cc]onnect.*check the path or bucket"):
            listing("http://127.0.0.1:9", urls=[written])
    with files_server(tmp_path) as web:
        for written in ("y.txt", "*.md"):
            with pytest.raises(UserError, match="no such file or object"):
                listing(web, urls=[written])
        assert keys(listing(f"{web}/", urls=[f"{web}/"])) == ["x.txt"]


def test_what_opens_an_object_is_in_memory_only(tmp_path: Path) -> None:
    fill(tmp_path / "web", "x.txt", "y.txt", "z.txt")
    with files_server(tmp_path / "web") as web:
        place = web.replace("://", "://user:hush@")
        signed = f"{web}/z.txt?X-Amz-Signature=hush&X-Amz-Date=1"
        made = recipe(place, urls=["x.txt", "[y]*.txt", signed, f"{signed}2"], heldout=[f"{place}/x.txt", signed])
        found = list_sources(made)
        assert [(one.key, one.url, one.heldout) for one in found] == [
            ("a/x.txt", f"{web}/x.txt", True),
            ("a/y.txt", f"{web}/y.txt", False),
            ("a/z.txt", f"{web}/z.txt", True),
        ]
        store = Store(str(tmp_path / "stage"))
        write_objects(store, found)
        committed = pq.read_table(tmp_path / "stage" / OBJECTS)
        assert f"{web}/y.txt" in str(committed.to_pydict())
        assert "hush" not in str(committed.to_pydict())
        assert "hush" not in repr(found) + "".join(heldout_notes(made, found))
        again = read_objects(store, made)
        assert again == found
        assert [one.opening_url for one in again] == [f"{place}/x.txt", f"{place}/y.txt", signed]
        with content_of(again[1], {}).opened() as file:
            assert file.read() == b"text of y.txt"


def test_a_web_address_is_the_same_with_and_without_percent_codes(tmp_path: Path) -> None:
    fill(tmp_path, "sp ace.txt", "ü[1].txt", "p%41.txt")
    with files_server(tmp_path) as web:
        written = ["*.txt", "sp ace.txt", "sp%20ace.txt", "%C3%BC[1].txt", "p%2541.txt"]
        found = listing(web, urls=written, heldout=["sp ace.txt", "%c3%bc%5B1%5D.txt"])
        assert keys(found, heldout=False) == ["p%2541.txt"]
        assert keys(found, heldout=True) == ["sp ace.txt", "ü[1].txt"]
        store = Store(str(tmp_path / "stage"))
        write_objects(store, found)
        for one in read_objects(store, recipe(web, urls=written)):
            with content_of(one, {}).opened() as file:
                assert file.read().decode() == f"text of {unquote(one.key.removeprefix('a/'))}"


def test_addresses_that_differ_in_their_query_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path, "x.txt")
    with files_server(tmp_path) as web:
        assert keys(listing(web, urls=[f"{web}/x.txt?id=1"])) == ["x.txt"]
        assert keys(listing(web, urls=[f"{web}/x.txt?id=1", f"{web}/x.txt?id=2"])) == ["x.txt?id=1", "x.txt?id=2"]
        with pytest.raises(UserError, match="differ only in what looks like credentials"):
            listing(web, urls=[f"{web}/x.txt?key=1", f"{web}/x.txt?key=2"])


def test_an_object_that_has_changed_since_it_was_listed_is_not_read(place: Any, object_store: ObjectStore) -> None:
    (found,) = place("x.txt")(urls=["x.txt"])
    options = object_store.options if found.url.startswith("s3:") else {}
    with content_of(found, options).opened() as file:
        assert file.read() == b"text of x.txt"
    fs, path = fsspec.core.url_to_fs(found.url, **options)
    for content in (b"text of y.txt", b""):
        fs.pipe(path, content)
        with (
            pytest.raises(UserError, match=r"x\.txt: has changed since it was listed; .* run again"),
            content_of(found, options).opened(),
        ):
            pass


def test_bad_rows_of_side_files_are_told_and_an_unreadable_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "x.mp4")
    (tmp_path / "side.jsonl").write_text('{"file": "x.mp4", "caption": "c"}\n{broken\n[1]\n')
    (found,) = listing(tmp_path, urls=["x.mp4"], side=["side.jsonl"], fields=["caption"])
    assert found.side == {"caption": "c"}
    (told,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert told.startswith(f"sources.a.side: left out 2 bad rows: first {tmp_path}/side.jsonl, line 2: broken JSON")
    (tmp_path / "side.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(UserError, match=rf"{tmp_path}/side\.parquet: no side data can be read from it \(not a whole"):
        listing(tmp_path, urls=["x.mp4"], side=["side.parquet"])


def test_a_name_that_no_manifest_can_hold_is_refused(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("x")
    with pytest.raises(UserError, match="this name is not UTF-8"):
        listing(tmp_path, urls=["*.txt"])
