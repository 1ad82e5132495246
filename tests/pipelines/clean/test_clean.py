"""Cleaning removes what no recipe of a run needs, all of that, and nothing else, wherever it is stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.clean.find import Found, find_runs, find_unneeded
from pipelines.clean.remove import Removed, in_order, leases, remove
from pipelines.dag.manifest import MANIFEST
from pipelines.inspect.verify import verify
from storage.errors import UserError
from storage.store import Store
from testing.s3_server import ObjectStore
from tests.pipelines.clean.made_run import Run, encoding, listed


def clean(*roots: Store) -> Removed:
    with leases(roots) as held:
        return remove(find_unneeded(held), held)


def unneeded(found: Found) -> dict[str, tuple[int, str]]:
    """By folder how many files, and why."""
    return {group.folder: (len(group.sizes), group.why) for group in found.unneeded}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def grown(run: Run, *names: str) -> Run:
    """Made, and made again over other objects."""
    run.make()
    later = replace(run, objects=[listed(name) for name in names])
    later.make()
    return later


def test_a_run_of_one_recipe_has_nothing_that_is_not_needed(run: Run) -> None:
    run.make()
    assert find_unneeded([run.root]).unneeded == ()
    assert clean(run.root) == Removed(0, 0, 0)


def check_growth(run: Run) -> None:
    """One object goes, another comes; the old one goes from the disk, and the next costs no more than itself."""
    later = grown(run, "a", "c")
    found = unneeded(find_unneeded([run.root]))
    own = {name: found.pop(name)[0] for name in list(found) if found[name][1].startswith("superseded by ")}
    assert sorted(own.values()) == [3, 3, 4]
    assert {name: count for name, (count, _) in found.items()} == {
        "stages/tokenize/documents": 1,
        "stages/pack-video/shards": 1,
        "stages/pack-video/partitions": 1,
        f"{encoding(later.fps)}/data": 1,
    }
    before = sum(run.root.sizes("", deep=True).values())
    removed = clean(run.root)
    assert removed.files == sum(own.values()) + 4
    assert removed.bytes == before - sum(run.root.sizes("", deep=True).values())
    assert later.is_done
    assert verify(run.root.url) == []
    assert clean(run.root) == Removed(0, 0, 0)
    more = replace(later, objects=[listed(name) for name in ("a", "c", "d")])
    assert more.make() == ["s3://b/d"]
    assert verify(run.root.url) == []


def test_what_went_from_the_sources_goes_and_the_next_object_costs_no_more_than_itself(run: Run) -> None:
    check_growth(run)


@pytest.mark.slow
def test_so_it_does_on_s3(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    check_growth(replace(run, root=Store(f"{object_store.url}/clean/run")))


def test_a_folder_is_gone_as_a_whole_and_its_bulk_records_too(run: Run) -> None:
    later = grown(run, "c")
    clean(run.root)
    history = run.root.at("stages", "tokenize")
    assert [len(history.folders()), len(history.folders("documents"))] == [3, 0]  # the fingerprint, documents, records
    records = [line for name in history.names("records") for line in history.read_bytes(name).splitlines()]
    assert [json.loads(line)["file"] for line in records] == history.names("documents")
    assert later.is_done


def test_what_was_trained_on_stays_and_what_was_only_packed_goes(run: Run) -> None:
    trained = replace(run, trains=True)
    trained.make()
    replace(run, context=32).make()
    later = replace(trained, context=16)
    later.make("sources", "tokenize", "pack-video")
    later.begin("train-video", "2026-12-01")
    last = replace(trained, context=48)
    last.make()
    assert {group.folder.rpartition("/")[0] for group in find_unneeded([run.root]).unneeded if group.is_whole} == {
        "stages/pack-video"
    }
    removed = clean(run.root)
    assert removed.files == 4 + 2 * len(run.objects)  # a folder of four files; shards and records
    assert verify(run.root.url) == []
    assert trained.is_done
    assert last.is_done
    assert [one.status for one in later.plan()] == ["done", "done", "done", "resume"]


def test_a_stage_that_has_begun_keeps_the_files_that_it_may_find_again(run: Run) -> None:
    run.make()
    again = replace(run, objects=[listed("c")])
    again.make("sources", "tokenize", "pack-video")
    third = replace(run, objects=[listed("a"), listed("d")])
    third.make("sources")
    third.begin("tokenize", "2026-12-01")
    found = find_unneeded([run.root])
    assert set(unneeded(found)) & {"stages/tokenize/documents", f"{encoding(run.fps)}/data"} == set()
    assert "stages/pack-video/shards" in unneeded(found)
    documents, codes = found.notes
    assert "documents stay, since tokenize/" in documents
    assert "begun on 2026-12-01, is not finished and may use them" in documents
    assert "the stage tokenize is not finished in" in codes
    clean(run.root)
    assert third.make() == ["s3://b/d"]
    assert verify(run.root.url) == []


def test_wherever_it_is_stopped_nothing_looks_whole_that_is_not(run: Run, tmp_path: Path) -> None:
    later = grown(run, "a", "c")
    steps = list(in_order(find_unneeded([run.root]).unneeded))
    files = [store.path(name) for store, names in steps for name in names]
    for count in range(1, len(files) + 1):
        copy = Path(shutil.copytree(run.root.path(), tmp_path / f"copy {count}"))
        for file in files[:count]:
            (copy / Path(file).relative_to(run.root.path())).unlink()
        assert replace(later, root=Store(str(copy))).is_done
        older = replace(run, root=Store(str(copy)))
        older.make()
        assert older.is_done
        assert verify(str(copy)) == [], f"after {count} of {len(files)} files"


def test_what_a_stopped_removal_left_is_removed_the_next_time(run: Run) -> None:
    later = grown(run, "a", "c")
    found = find_unneeded([run.root])
    (store, names), *_ = in_order(found.unneeded)
    assert all(name.endswith(MANIFEST) for name in names)
    store.delete_many(names)
    clean(run.root)
    assert find_unneeded([run.root]).unneeded == ()
    assert later.is_done
    assert verify(run.root.url) == []


def test_a_run_of_a_later_version_is_left_alone(run: Run) -> None:
    grown(run, "a")
    (name, *_) = [one for one in run.root.names("stages") if one.endswith(MANIFEST)]
    run.root.write_json(name, {**run.root.read_json(name), "format": 99})
    with pytest.raises(UserError, match=r"has format 99, this version reads up to"):
        clean(run.root)


@pytest.mark.parametrize("lost", ["partitions.parquet", "clips-train.json", "objects.parquet"])
def test_nothing_is_removed_where_a_list_of_files_is_damaged(run: Run, lost: str) -> None:
    later = grown(run, "a")
    for planned in later.plan():
        for name in planned.store.names():
            if name.endswith(lost):
                with planned.store.writing(name) as file:
                    file.write(b"{}")
    before = run.root.names()
    with pytest.raises(UserError, match=r"what it names cannot be read .* nothing tells what is needed"):
        clean(run.root)
    assert run.root.names() == before


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run, which has a folder stages; give the storage.root of one"):
        find_runs([str(tmp_path)])


def test_a_run_that_is_named_twice_is_one(run: Run, tmp_path: Path) -> None:
    run.make()
    (tmp_path / "link").symlink_to(run.root.path())
    assert len(find_runs([run.root.url, f"{run.root.url}/", str(tmp_path / "link")])) == 1


def test_a_run_that_a_driver_writes_to_is_not_cleaned(run: Run) -> None:
    grown(run, "a")
    before = run.root.names()
    with leases([run.root]), pytest.raises(UserError, match=r"another driver .* writes here"):
        clean(run.root)
    assert run.root.names() == before
