"""A rebuild of an evaluation that has holes begins with what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.dag.manifest import MANIFEST, STARTED, Declaration, Manifest
from pipelines.evaluate.cell import Hole
from pipelines.evaluate.rebuilt import take_cells_before
from pipelines.evaluate.record import EvaluateFigures, EvaluateOutputs, EvaluateRecord
from storage.store import Store

FILES = ("partitions/needle-128-0.json", "pictures/a.png", "counts/a.safetensors")
HOLES = (Hole("needle-128-1", "needle", "a worker or its node died, 5 times"),)


def begun(root: Store, declaration: Declaration) -> Store:
    store = root.at(declaration.fingerprint[:16])
    store.write_json(STARTED, declaration.to_json())
    return store


def evaluated(root: Store, holes: tuple[Hole, ...]) -> Declaration:
    declaration = Declaration("evaluate", "evaluate", {"seed": 3}, 1, {"train-text": "ab"})
    store = begun(root, declaration)
    for name in FILES:
        with store.writing(name) as file:
            file.write(name.encode())
    record = EvaluateRecord(EvaluateOutputs(FILES[:1], FILES[1:2]), EvaluateFigures.of({}, holes))
    store.write_json(MANIFEST, Manifest(declaration, record, fingerprint=declaration.fingerprint).to_json())
    return declaration


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "stages" / "evaluate"))


def test_what_was_measured_is_taken_along_and_nothing_else(root: Store) -> None:
    again = begun(root, replace(evaluated(root, HOLES), rebuild=1))
    with again.writing(FILES[1]) as file:
        file.write(b"made meanwhile")
    take_cells_before(again)
    assert sorted(again.names()) == sorted([*FILES, STARTED])
    assert again.read_bytes(FILES[0]) == FILES[0].encode()
    assert again.read_bytes(FILES[1]) == b"made meanwhile"


def test_without_holes_with_other_settings_or_without_a_rebuild_all_is_measured_anew(root: Store) -> None:
    whole = evaluated(root.at("whole"), ())
    holed = evaluated(root.at("holed"), HOLES)
    for store in (
        begun(root.at("whole"), replace(whole, rebuild=1)),
        begun(root.at("holed"), replace(holed, rebuild=1, settings={"seed": 4})),
        begun(root.at("holed"), replace(holed, rebuild=0, settings={"seed": 5})),
    ):
        take_cells_before(store)
        assert store.names() == [STARTED]


def test_figures_of_tasks_without_a_field_are_kept_by_name() -> None:
    figures = EvaluateFigures.of({"needle": ({"a": 1},), "ruler": ({"b": 2},), "qa": ()}, HOLES)
    assert figures.rows("needle") == ({"a": 1},)
    assert figures.rows("ruler") == ({"b": 2},)
    assert figures.rows("qa") == ()
    assert figures.further == {"ruler": ({"b": 2},)}
    assert EvaluateFigures.of({}, ()) == EvaluateFigures()
