"""A plan says how a listing differs from the one that the run committed last."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dag.manifest import MANIFEST
from pipelines.dag.plan import plan
from pipelines.dag.stage import StageContext
from pipelines.run import run_stage
from pipelines.sources.listing import Listing, SourceObject, write_objects
from pipelines.sources.listing_changes import changes_since, compared_columns, listing_changes
from pipelines.sources.stage import SourcesStage
from storage.store import Store

ROWS = st.dictionaries(st.tuples(st.integers(0, 6), st.booleans()), st.integers(0, 2), max_size=8)


def listing(rows: dict[tuple[int, bool], int]) -> Listing:
    return Listing.of(
        SourceObject(f"a/{key}.tar", "a", f"/d/{key}.tar", size, "e", "webdataset", heldout, {})
        for (key, heldout), size in sorted(rows.items())
    )


def columns(of: Listing) -> pa.Table:
    return pa.table({name: of.column(name) for name in ("key", "identity")})


@settings(max_examples=50)
@given(ROWS, ROWS)
def test_an_object_is_new_changed_or_gone_by_its_key_and_all_that_decides_its_documents(
    old: dict[tuple[int, bool], int], new: dict[tuple[int, bool], int]
) -> None:
    changes = listing_changes(columns(listing(old)), listing(new))
    differ, before = dict(new.items() - old.items()), dict(old.items() - new.items())
    old_keys, new_keys = {key for key, _ in before}, {key for key, _ in differ}
    assert changes.new == listing({row: size for row, size in differ.items() if row[0] not in old_keys})
    assert changes.changed == listing({row: size for row, size in differ.items() if row[0] in old_keys})
    assert changes.gone == sum(key not in new_keys for key, _ in before)


def committed(root: Store, objects: Listing) -> SourcesStage:
    """Commit a listing as a run does."""
    found = changes_since(root.at("stages", "sources"), objects)
    stage = SourcesStage(objects, (), (found[0].sentence(len(objects), found[1]),) if found else ())
    (planned,) = plan([stage], root)
    run_stage(planned, StageContext(planned.store, {}))
    return stage


def test_the_plan_of_a_grown_listing_says_what_grew(tmp_path: Path) -> None:
    root = Store(str(tmp_path))
    rows = {(number, False): 1 for number in range(2000)}
    assert committed(root, listing(rows)).changes == ()
    again = listing(rows)
    assert changes_since(root.at("stages", "sources"), again) is None
    rows |= {(number, False): 2 for number in range(1998, 2003)}
    del rows[5, False]
    grown = listing(rows)
    stage = committed(root, grown)
    (note,) = stage.changes
    assert note.startswith("3 of 2,002 objects new, 2 changed, 1 gone since the listing of 20")
    (planned,) = plan([dataclasses.replace(stage, changes=())], root)
    assert (planned.status, planned.notes) == ("done", ())


@pytest.mark.parametrize("damage", ["file", "older"])
def test_a_listing_that_cannot_be_read_is_not_compared_with(tmp_path: Path, damage: str) -> None:
    root = Store(str(tmp_path))
    committed(root, listing({(1, False): 1}))
    (folder,) = (tmp_path / "stages/sources").iterdir()
    if damage == "file":
        (folder / "objects.parquet").write_bytes(b"PAR1")
    else:
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("objects.parquet", "objects.jsonl"))
    assert changes_since(root.at("stages", "sources"), listing({(2, False): 1})) is None


def test_the_columns_that_are_compared_are_read_alone(tmp_path: Path) -> None:
    store: Any = Store(str(tmp_path))
    write_objects(store, listing({(1, False): 1}))
    assert compared_columns(store).equals(columns(listing({(1, False): 1})))
