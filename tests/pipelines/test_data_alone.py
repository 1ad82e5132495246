"""A recipe without `train` makes shards and a report of them; `--until` makes a part of any recipe's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from pipelines.build import build_stages
from pipelines.dag.plan import plan
from pipelines.recipe import Recipe
from pipelines.recipe.load import load_recipe
from storage.errors import UserError
from storage.store import Store
from testing.miniature import write_recipe
from testing.tiny_run import story

SHARDS = Path(__file__).parents[2] / "recipes" / "shards.yaml"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A recipe of data alone, over a text to pack and another that is held out."""
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("a", "held")):
        (tmp_path / "data" / f"{name}.txt").write_text(story(seed))
    tree = yaml.safe_load(SHARDS.read_text())
    del tree["vqgan"]
    tree["storage"] = {"root": str(tmp_path / "run"), "data": str(tmp_path / "data")}
    tree["sources"] = {"plays": {"urls": ["*.txt"], "heldout": ["*/held.txt"]}}
    tree["pack"]["stages"] = [{"name": "short", "context": 128, "objective": "text", "sources": ["plays"]}]
    return dict(tree)


def run(tree: dict[str, Any], folder: Path, *arguments: str) -> int:
    return main(["run", str(write_recipe(folder / "recipe.yaml", tree)), *arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_recipe_of_data_alone_runs_to_shards_and_a_report(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, tmp_path, "--until", "tokenize") == 0
    stages = tmp_path / "run" / "stages"
    assert sorted(path.name for path in stages.iterdir()) == ["sources", "tokenize"]
    assert capsys.readouterr().out == (f"done: sources, tokenize, in {stages}; without --until the run carries on\n")
    assert run(tree, tmp_path) == 0
    assert sorted(path.name for path in stages.iterdir()) == ["pack-short", "report", "sources", "tokenize"]
    assert capsys.readouterr().out == f"report: {tmp_path / 'run' / 'report.html'}\n"
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["split"] for row in facts["shards"]] == ["train", "heldout"]
    assert facts["shards"][0]["fill"] > 0.8
    assert (facts["training"], facts["evaluation"], facts["verdicts"]) == ([], {}, [])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Shards</h2>" in page
    for absent in ("What the numbers say", "Held-out loss", "<h2>Training</h2>"):
        assert absent not in page
    assert main(["inspect", str(tmp_path / "run"), "--verify"]) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"done"}


def test_shards_that_were_made_alone_are_those_of_a_training_on_the_same_data(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    def fingerprints(tree: dict[str, Any]) -> dict[str, str]:
        stages = build_stages(Recipe.model_validate(tree))
        return {stage.name: stage.fingerprint for stage in plan(stages, Store(str(tmp_path / "run")))}

    alone = fingerprints(tree)
    (data,) = tree.pop("pack")["stages"]
    sources = data.pop("sources")
    training = {"mixture": dict.fromkeys(sources, 1), "rope_theta": 1e4, "steps": 2, "batch_tokens": 256, "lr": 1e-3}
    trained = fingerprints({**tree, "train": {"stages": [{**data, **training}]}})
    assert {name: trained[name] for name in ("sources", "tokenize", "pack-short")} == {
        name: alone[name] for name in ("sources", "tokenize", "pack-short")
    }


DATA = "{name: a, context: 64, objective: text, sources: [plays]}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pack.stages=[]"], "neither train nor pack.stages is there; add train, or pack.stages to make shards alone"),
        (["model.size=debug"], "model is of a model, and without train there is none; drop it, or add train"),
        (["evaluate.max_sequences=1"], "evaluate is of a model, and without train there is none"),
        ([f"pack.stages=[{DATA}, {DATA}]"], "pack.stages: two stages have the same name"),
        (["pack.stages.0.sources=[books]"], "pack.stages.0.sources names the source 'books', which sources does not"),
        (["pack.stages.0.min_document_tokens=9", "pack.stages.0.max_document_tokens=8"], "so no document fits"),
        (["pack.stages.0.lr=1"], "unknown key 'pack.stages.0.lr'; known keys here: context, max_document_tokens"),
        (["pack.stages.0.sources=[]"], "pack.stages.0.sources: "),
    ],
)
def test_a_mistake_in_a_recipe_of_data_alone_is_one_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(SHARDS, overrides)
    assert said in str(caught.value)


def test_a_recipe_that_trains_names_its_data_once() -> None:
    with pytest.raises(UserError, match="is for recipes without train, each of whose stages names its data; drop one"):
        load_recipe(SHARDS.with_name("quickstart.yaml"), [f"pack.stages=[{DATA}]"])


def test_a_recipe_of_data_alone_has_no_memory_of_training_to_plan(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--memory", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 2
    assert capsys.readouterr().err == (
        "ringworld: --memory: the recipe has no train, so there is no memory to plan; leave the option out\n"
    )
