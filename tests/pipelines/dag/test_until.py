"""`--until` leaves of a DAG the named stages and what they need; what is asked beyond that is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from pipelines.build import build_stages
from pipelines.dag.plan import REBUILDS, plan
from pipelines.dag.stage import Stage
from pipelines.dag.until import stages_until
from pipelines.run import run_stages
from pipelines.sources.list_sources import list_sources
from storage.errors import UserError
from storage.store import Store
from testing.tiny_run import tiny_recipe, write_clip
from tests.pipelines.dag.test_plan import stages


@pytest.fixture
def dag(tmp_path: Path) -> list[Stage[Any]]:
    """The stages of two trainings, on text and on clips, none of which is run."""
    (tmp_path / "data").mkdir()
    for name in ("a", "held"):
        (tmp_path / "data" / f"{name}.txt").write_text("a text")
        write_clip(tmp_path / "data" / f"{name}.mp4", 1, 2)
    recipe = tiny_recipe(tmp_path)
    return build_stages(recipe, list_sources(recipe))


DATA = ["sources", "vqgan", "tokenize"]


@pytest.mark.parametrize(
    ("last", "left"),
    [
        ("sources", ["sources"]),
        ("vqgan", ["vqgan"]),
        ("tokenize", DATA),
        ("pack-video", [*DATA, "pack-video"]),
        ("pack", [*DATA, "pack-text", "pack-video"]),
        ("train-text", [*DATA, "pack-text", "train-text"]),
        ("train", [*DATA, "pack-text", "train-text", "pack-video", "train-video"]),
    ],
)
def test_a_stage_or_all_of_a_kind_run_with_what_they_need(dag: list[Stage[Any]], last: str, left: list[str]) -> None:
    assert [stage.name for stage in stages_until(dag, last)] == left


def test_the_last_stage_needs_all(dag: list[Stage[Any]]) -> None:
    assert stages_until(dag, "report") == dag


def test_an_unknown_stage_is_refused_with_those_that_there_are(dag: list[Stage[Any]]) -> None:
    said = r"--until packs: the recipe has no such stage; its stages are sources, vqgan, tokenize, pack-text, .*report"
    with pytest.raises(UserError, match=said):
        stages_until(dag, "packs")


def test_what_is_not_run_is_not_made_again(dag: list[Stage[Any]]) -> None:
    with pytest.raises(UserError, match="--rebuild evaluate: --until pack does not need this stage"):
        stages_until(dag, "pack", ["evaluate"])
    assert stages_until(dag, "pack", ["tokenize"]) == stages_until(dag, "pack")


def test_what_was_made_again_beyond_it_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.run.ray_instance", lambda address, need: contextlib.nullcontext())
    store = Store(str(tmp_path))
    run_stages(plan(stages(), store), store)
    run_stages(plan(stages(), store, rebuild=["train"]), store)
    run_stages(plan(stages_until(stages(), "pack"), store, rebuild=["tokenize"]), store)
    assert store.read_json(REBUILDS) == {"tokenize": 1, "train": 1}
