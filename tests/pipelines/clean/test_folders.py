"""Needed are the latest folders of each stage, every training, what recipes would use, and all that these came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.clean.folders import StageFolder, latest, needed_keys, parts, why_not_needed
from pipelines.dag.manifest import Declaration, Manifest, PlainRecord


def folder(key: str, *inputs: str, began: str = "", finished: str = "", **facts: Any) -> StageFolder:
    """inputs: keys. finished: "" where it is not."""
    stage = key.partition("/")[0]
    declared = {one.partition("/")[0]: one.partition("/")[2] for one in inputs}
    declaration = Declaration(stage, stage.partition("-")[0], {}, 1, declared)
    manifest = (
        Manifest(declaration, PlainRecord(), finished=finished, **facts.pop("manifest", {})) if finished else None
    )
    return StageFolder(key, declaration, began, manifest, **facts)


def needed(folders: Iterable[StageFolder], *wanted: str) -> set[str]:
    by_key: Mapping[str, StageFolder] = {one.key: one for one in folders}
    return needed_keys(by_key, wanted)


FIRST = [
    folder("sources/1", finished="2026-01-01"),
    folder("tokenize/1", "sources/1", finished="2026-01-02"),
    folder("pack-a/1", "tokenize/1", finished="2026-01-03"),
]
SECOND = [
    folder("sources/2", finished="2026-02-01"),
    folder("tokenize/2", "sources/2", finished="2026-02-02"),
    folder("pack-a/2", "tokenize/2", finished="2026-02-03"),
]
KEYS_1, KEYS_2 = ({one.key for one in chain} for chain in (FIRST, SECOND))


def test_the_latest_chain_is_needed_and_the_one_before_says_what_superseded_it() -> None:
    assert needed(FIRST + SECOND) == KEYS_2
    by_key = {one.key: one for one in FIRST + SECOND}
    assert why_not_needed(FIRST[1], by_key) == "superseded by 2 of 2026-02-02"


def test_every_training_needs_what_it_was_made_from_whether_it_is_finished_or_has_only_begun() -> None:
    for training in (
        folder("train-a/1", "pack-a/1", finished="2026-01-04"),
        folder("train-a/1", "pack-a/1", began="2026"),
    ):
        later = folder("train-a/2", "pack-a/2", finished="2026-02-04")
        assert needed([*FIRST, *SECOND, training, later]) == KEYS_1 | KEYS_2 | {"train-a/1", "train-a/2"}


def test_what_a_recipe_would_use_is_needed_with_all_that_it_came_from() -> None:
    assert needed(FIRST + SECOND, "tokenize/1", "evaluate/of no folder") == KEYS_2 | {"tokenize/1", "sources/1"}


def test_an_unfinished_folder_counts_where_it_was_begun_after_the_last_was_finished() -> None:
    old, newer, newest = (folder(f"tokenize/{n}", began=f"2026-0{n}-01") for n in (1, 3, 4))
    finished = folder("tokenize/2", began="2026-01-01", finished="2026-02-01")
    assert latest([old, newer, newest, finished]) == [finished, newest]
    assert latest([old, finished]) == [finished]
    assert latest([old]) == [old]
    reason = why_not_needed(old, {one.key: one for one in (old, finished)})
    assert reason == "begun on 2026-01-01, never finished; superseded by 2 of 2026-02-01"


def test_of_folders_finished_in_the_same_second_all_stay() -> None:
    same = [folder(f"tokenize/{n}", finished="2026-01-01") for n in (1, 2)]
    assert needed(same) == {"tokenize/1", "tokenize/2"}


def test_where_an_input_was_read_counts_more_than_the_fingerprint_that_is_declared() -> None:
    read = {"input_folders": {"tokenize": "stages/tokenize/1"}}
    adopting = folder("pack-a/3", "tokenize/of today", finished="2026-03-01", manifest=read)
    assert needed([*FIRST, *SECOND, adopting]) == {"pack-a/3", *(KEYS_1 - {"pack-a/1"}), *(KEYS_2 - {"pack-a/2"})}


def test_an_unfinished_stage_may_have_adopted_any_folder_that_hashes_of_code_name() -> None:
    old = [folder(f"tokenize/{n}", finished=f"2026-01-0{n}", is_adoptable=True) for n in (1, 2)]
    own = folder("tokenize/3", finished="2026-01-03")
    begun = folder("pack-a/1", "tokenize/of today", began="2026-02-01")
    assert needed([*old, own, begun]) == {"tokenize/1", "tokenize/2", "tokenize/3", "pack-a/1"}


def test_leftovers_of_a_folder_are_not_needed() -> None:
    left = StageFolder("pack-a/1")
    assert needed([left, *SECOND]) == KEYS_2
    assert "being removed" in why_not_needed(left, {})


def test_a_training_that_has_lost_what_declares_it_stays() -> None:
    assert needed([StageFolder("train-a/1"), *SECOND]) == {"train-a/1", *KEYS_2}


def test_the_parts_of_a_name_are_of_files_in_folders_of_stages() -> None:
    assert parts("stages/tokenize/documents/a/b.parquet") == ("tokenize", "documents", "a/b.parquet")
    assert parts("stages/tokenize/stray")[1:] == ("", "")
    assert parts("stages/stray") == ("stray", "", "")
