"""Codes that no run refers to are removed, once all runs that may refer to them are given."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.clean.find import find_unneeded
from pipelines.clean.remove import Removed, leases, remove
from pipelines.tokenize.codes.index import CodesIndex, write_index
from pipelines.tokenize.codes.users import RUNS, Place, note_user, users
from storage.public_url import object_url, public_url
from storage.store import Store
from tests.pipelines.clean.made_run import Run, encoding, listed
from tokenization.codecs.codes_file import object_id


def clean(*runs: Run) -> Removed:
    with leases([run.root for run in runs]) as held:
        return remove(find_unneeded(held), held)


def notes(*runs: Run) -> Sequence[str]:
    return find_unneeded([run.root for run in runs]).notes


def data(codes: Store, fps: float = 4.0) -> list[str]:
    return codes.at(encoding(fps)).names("data")


@pytest.fixture
def codes(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "codes"))


@pytest.fixture
def one(run: Run, codes: Store) -> Run:
    """Was made over two objects, and then over one of them."""
    replace(run, codes=codes).make()
    later = replace(run, codes=codes, objects=run.objects[:1])
    later.make()
    return later


@pytest.fixture
def other(one: Run, tmp_path: Path) -> Run:
    """Another run that uses the same codes, made over the other object and a third."""
    made = replace(one, root=Store(str(tmp_path / "other")), objects=[listed("b"), listed("c")])
    assert made.make() == ["s3://b/c"]
    return made


def test_shared_codes_stay_unless_all_runs_that_use_them_are_given(one: Run, other: Run, codes: Store) -> None:
    (note,) = notes(one)
    assert note == (
        f"{codes.path()}: left as it is, for these runs use it too and are not given: {other.root.path()}; give them, "
        f"or delete what names them in {codes.path(RUNS)} if they are gone for good"
    )
    clean(one)
    assert len(data(codes)) == 3
    assert notes(one, other) == ()
    clean(one, other)
    assert len(data(codes)) == 3, "the one needs the first, the other needs the rest"
    replace(other, objects=[listed("c")]).make()
    clean(one, other)
    assert len(data(codes)) == 2
    assert clean(one, other) == Removed(0, 0, 0)
    more = replace(other, objects=[listed(name) for name in "abc"])
    assert more.make() == ["s3://b/b"]


def test_a_run_that_is_gone_counts_as_given_and_is_named(one: Run, other: Run, codes: Store) -> None:
    shutil.rmtree(other.root.path())
    assert notes(one) == (f"{codes.path()}: {other.root.path()}, which used these codes, is gone",)
    clean(one)
    assert len(data(codes)) == 1


def test_a_folder_of_another_machine_is_never_taken_for_gone(one: Run, codes: Store) -> None:
    codes.write_json(f"{RUNS}/0.json", {"root": "/data/run", "host": "elsewhere", "inode": 1})
    (note,) = notes(one)
    assert "use it too and are not given: /data/run of elsewhere; give them" in note
    clean(one)
    assert len(data(codes)) == 2


def test_a_folder_on_a_shared_disk_is_known_on_every_machine_and_one_of_the_same_path_is_another(
    one: Run, codes: Store
) -> None:
    (name,) = codes.names(RUNS)
    noted = codes.read_json(name)
    codes.write_json(name, {**noted, "host": "elsewhere"})
    assert notes(one) == ()
    codes.write_json(name, {**noted, "host": "elsewhere", "inode": noted["inode"] + 1})
    (note,) = notes(one)
    assert f"not given: {one.root.path()} of elsewhere" in note


def test_a_bucket_that_does_not_answer_is_never_taken_for_gone(
    one: Run, codes: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"key": "k", "secret": "hush", "endpoint_url": "http://127.0.0.1:1"}
    note_user(codes, Store("s3://bucket/run", secret))
    assert all("hush" not in str(codes.read_json(name)) for name in codes.names(RUNS))
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "ENDPOINT_URL": secret["endpoint_url"]}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    (note,) = notes(one)
    assert "use it too and are not given: s3://bucket/run; give them" in note


def test_codes_of_an_encoding_that_nothing_uses_any_more_go_with_its_folder(run: Run) -> None:
    run.make()
    later = replace(run, fps=8.0)
    later.make()
    root = run.root.at("codes")
    assert set(root.folders()) == {RUNS, encoding(4.0), encoding(8.0)}
    clean(later)
    assert data(root) == []
    assert len(data(root, 8.0)) == 2
    assert later.is_done


def test_files_that_are_not_of_a_store_of_codes_are_never_removed(one: Run, codes: Store) -> None:
    strange = [
        "readme.md",
        "data/x.parquet",
        f"{encoding(4.0)}/data/notes.txt",
        f"{'0' * 16}/x",
        f"{'0' * 16}/data/a/b",
    ]
    for name in strange:
        codes.write_json(name, 1)
    assert clean(one).files > 0
    assert set(strange) < set(codes.names())


def test_codes_of_media_that_records_name_are_those_of_the_named_objects(run: Run) -> None:
    records = [listed(name, kind="records", media="url") for name in ("a.jsonl", "b.jsonl")]
    media = {one.url: (f"https://h/{one.key}.jpg", "7") for one in records}
    made = replace(run, objects=records, media=media)
    made.make()
    later = replace(made, objects=records[:1])
    later.make()
    clean(later)
    index = CodesIndex(run.root.at("codes", encoding(4.0)))
    index.load()
    kept, gone = (bool(index.find([object_id(*media[one.url])])[0]) for one in records)
    assert (kept, gone) == (True, False)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pw@h/a%20b.jpg?x=1&token=hush",
        "https://h/a.jpg?X-Amz-Signature=1&X-Amz-Date=2&v=3",
        "s3://key:hush@b/a?b.jpg",
        "/data/a b.jpg",
    ],
)
def test_the_url_that_a_document_shows_of_its_medium_leads_to_the_name_of_its_codes(url: str) -> None:
    assert object_url(public_url(url)) == object_url(url)


def test_the_index_names_only_what_is_there_and_files_are_found_before_and_after(
    one: Run, codes: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tokenize.codes.index._UNINDEXED", 0)
    folder = codes.at(encoding(4.0))
    write_index(folder)
    before = folder.names("index")
    clean(one)
    after = folder.names("index")
    assert (len(before), len(after)) == (1, 1)
    assert before != after
    index = CodesIndex(folder)
    index.load()
    kept = [object_id(found.url, found.etag) for found in (listed("a"), listed("b"))]
    assert index.find(kept) == [data(codes), []]
    with folder.open(after[0]) as file:
        assert pq.read_table(file).column("file").to_pylist() == data(codes)
    assert clean(one) == Removed(0, 0, 0)
    assert folder.names("index") == after
    replace(one, objects=[listed("c")]).make()
    clean(one)
    assert folder.names("index") == [], "the file that was made since is in no index, and the others are gone"


def test_codes_in_a_run_that_has_been_moved_are_still_its_own(run: Run, tmp_path: Path) -> None:
    run.make()
    replace(run, objects=run.objects[:1]).make()
    moved = replace(run, root=Store(str(tmp_path / "moved")))
    Path(run.root.path()).rename(moved.root.path())
    clean(moved)
    assert len(data(moved.root.at("codes"))) == 1
    borrower = replace(run, root=Store(str(tmp_path / "borrower")), codes=moved.root.at("codes"))
    borrower.make()
    assert any(f"not given: {moved.root.path()};" in note for note in notes(borrower))


def test_half_written_files_of_dead_writers_are_swept_after_a_day(one: Run, other: Run, codes: Store) -> None:
    old, young = (Path(codes.path()) / encoding(4.0) / "data" / f".tmp-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    long_ago = time.time() - 25 * 3600
    os.utime(old, (long_ago, long_ago))
    assert clean(one).temporaries == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_a_run_is_noted_once_however_it_is_called(codes: Store, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for url in (str(tmp_path / "run"), f"{tmp_path}/run/", f"file://{tmp_path}/run", str(tmp_path / "link")):
        note_user(codes, Store(url))
    assert [place.url for place in users(codes)] == [str(tmp_path / "run")]
    assert next(users(codes)).inode == (tmp_path / "run").stat().st_ino
    assert Place.of(Store("s3a://b/run/")) == Place.of(Store("s3://b/run")) == Place("s3://b/run")
