"""A recipe without `train` makes shards and a report of them; `--until` makes a part of any recipe's data."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from tokenization.shards.set_files import read_set
from tokenization.shards.shard import read_sequence

SHARDS = Path(__file__).parents[2] / "recipes" / "shards.yaml"


def small(folder: Path) -> dict[str, Any]:
    """The recipe of shards, over a text to pack and another that is held out, in one stage of short sequences."""
    (folder / "data").mkdir()
    for seed, name in enumerate(("a", "held")):
        (folder / "data" / f"{name}.txt").write_text(story(seed))
    tree: dict[str, Any] = yaml.safe_load(SHARDS.read_text())
    del tree["vqgan"]
    tree["storage"] = {"root": str(folder / tree["storage"]["root"]), "data": str(folder / "data")}
    tree["sources"] = {"plays": {"urls": ["*.txt"], "heldout": ["*/held.txt"]}}
    tree["pack"] = {"sequences_per_shard": 2, "stages": [{**tree["pack"]["stages"][0], "context": 128}]}
    return tree


@dataclass(frozen=True)
class Run:
    """A run of `small`: up to its documents, then to its end; what it printed, and the stages there were by then."""

    folder: Path
    said: list[str]
    stages: list[list[str]]

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "shards"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    made = Run(tmp_path_factory.mktemp("shards"), [], [])
    recipe = write_recipe(made.folder / "recipe.yaml", small(made.folder))
    for until in (["--until", "tokenize"], []):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["run", str(recipe), *until]) == 0
        made.said.append(said.getvalue())
        made.stages.append(sorted(path.name for path in (made.root / "stages").iterdir()))
    return made


@pytest.mark.slow
def test_a_run_ends_at_the_stage_that_is_named_and_carries_on_from_there(run: Run) -> None:
    assert run.stages == [["sources", "tokenize"], ["pack-text-4k", "report", "sources", "tokenize"]]
    assert run.said == [
        f"done: sources, tokenize, in {run.root / 'stages'}; without --until the run carries on\n",
        f"report: {run.root / 'report.html'}\n",
    ]


@pytest.mark.slow
def test_the_report_of_data_alone_is_of_data_alone(run: Run) -> None:
    facts = json.loads((run.root / "report.json").read_text())
    assert [row["split"] for row in facts["shards"]] == ["train", "heldout"]
    assert facts["shards"][0]["fill"] > 0.8
    assert (facts["training"], facts["evaluation"], facts["verdicts"]) == ([], {}, [])
    page = (run.root / "report.html").read_text()
    assert "<h2>Shards</h2>" in page
    for absent in ("What the numbers say", "Held-out loss", "<h2>Training</h2>"):
        assert absent not in page


@pytest.mark.slow
def test_data_alone_is_verified_and_done(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run.root), "--verify"]) == 0
    capsys.readouterr()
    assert main(["plan", str(run.folder / "recipe.yaml"), "--json"]) == 0
    assert {row["status"] for row in json.loads(capsys.readouterr().out)} == {"done"}


@pytest.mark.slow
def test_the_page_of_shards_reads_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the page's own code, run where `runs/shards` is, both readers see the sequences, and the text is the text."""
    import datasets  # seconds that those who run no slow test are spared
    import webdataset

    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run.folder / "cache")
    blocks = re.findall(r"```python\n(.*?)```", (SHARDS.parents[1] / "docs" / "shards.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    page: dict[str, Any] = {}
    for block in blocks:
        exec(block, page)
    stage = run.root / "stages" / "pack-text-4k"
    (folder,) = (path.parent for path in stage.glob("*/sets"))
    shards = read_set(Store(str(stage)), f"{folder.name}/sets/plays-train.json")
    expected = []
    for place in range(len(shards)):
        name, _, entry = shards.locate(place)
        with (stage / name).open("rb") as file:
            expected.append(read_sequence(file, entry))
    assert len(shards.names) > 1
    last = expected[-1]
    for tensors in (page["sequence"], page["tensors"]):
        for name in ("tokens", "cu_seqlens", "loss_weight"):
            np.testing.assert_array_equal(tensors[name], getattr(last, name))
    assert page["lineage"] == list(last.lineage)
    assert len(page["contents"]) == last.n_examples
    assert all(text.strip() in (run.folder / "data" / "a.txt").read_text() for text in page["contents"])
    keys = [sequence.key for sequence in expected]
    assert [sample["__key__"] for sample in webdataset.WebDataset(page["urls"], shardshuffle=False)] == keys


def test_shards_that_were_made_alone_are_those_of_a_training_on_the_same_data(
    tmp_path: Path,
) -> None:
    tree = small(tmp_path)

    def fingerprints(tree: dict[str, Any]) -> dict[str, str]:
        stages = build_stages(Recipe.model_validate(tree))
        return {stage.name: stage.fingerprint for stage in plan(stages, Store(str(tmp_path)))}

    alone = fingerprints(tree)
    (data,) = tree["pack"].pop("stages")
    sources = data.pop("sources")
    training = {"mixture": dict.fromkeys(sources, 1), "rope_theta": 1e4, "steps": 2, "batch_tokens": 256, "lr": 1e-3}
    trained = fingerprints({**tree, "train": {"stages": [{**data, **training}]}})
    assert {name: trained[name] for name in ("sources", "tokenize", "pack-text-4k")} == {
        name: alone[name] for name in ("sources", "tokenize", "pack-text-4k")
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--memory", str(write_recipe(tmp_path / "recipe.yaml", small(tmp_path)))]) == 2
    assert capsys.readouterr().err == (
        "ringworld: --memory: the recipe has no train, so there is no memory to plan; leave the option out\n"
    )
