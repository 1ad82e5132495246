"""`ringworld eval` on an exported model: figures, what it carries on with, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from testing.committed_run import commit_run

pytestmark = pytest.mark.slow

NEEDLE = ["--set", "needle.contexts=[256]", "--set", "needle.depths=2", "--set", "evaluate.needle.rounds=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `run`, its recipe, and its last model, exported, in `model`."""
    folder = tmp_path_factory.mktemp("eval") / "home"
    recipe, _ = commit_run(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
    return folder


@pytest.mark.usefixtures("local_ray")
def test_a_model_is_measured_without_a_recipe_and_again_only_where_something_changed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", "needle", "generation", str(home / "model"), "--out", str(out), *NEEDLE]
    command += ["--set", f"text={home}/data/*.txt", "--set", "generation.frames=1", "--set", "generation.prompts=[sea]"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"needle: {out}/needle.json"
    assert printed[1].split()[:4] == ["part", "context", "depths", "rounds"]
    assert printed[2].split()[:2] == ["needle-256", "256"]
    needle = json.loads((out / "needle.json").read_text())
    assert needle["holes"] == []
    assert needle["settings"]["needle"] == {"contexts": [256], "depths": 2, "rounds": 2}
    (row,) = needle["rows"]
    assert (row["rounds"], len(row["answers"])) == (2, 6)
    (picture,) = json.loads((out / "generation.json").read_text())["rows"]
    cells = {path.name: path.stat().st_mtime_ns for path in out.rglob("partitions/*.json")}
    assert set(cells) == {"needle-256-0.json", "needle-256-1.json", "prompt-0.json"}
    assert len(list(out.glob(f"cells/generation-*/{picture['file']}"))) == 1
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needle"] == needle["rows"]
    assert main([*command, "--set", "generation.prompts=[sun]"]) == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.rglob("partitions/needle*.json")}
    assert again == {name: cells[name] for name in again}
    assert len(list(out.rglob("partitions/prompt-0.json"))) == 2


@pytest.mark.usefixtures("local_ray")
def test_a_recipe_gives_the_data_and_the_settings_that_are_not_given(undisturbed: Path, tmp_path: Path) -> None:
    assert main(["export", str(undisturbed), "--out", str(tmp_path / "model")]) == 0
    command = ["eval", "heldout", "reconstruction", str(tmp_path / "model")]
    command += ["--recipe", str(undisturbed.with_name("recipe.yaml"))]
    assert main(command) == 0
    report = json.loads((undisturbed / "report.json").read_text())["evaluation"]
    of_run = {(row["source"], row["modality"]): row for row in report["heldout"] if row["stage"] == "final"}
    heldout = json.loads((tmp_path / "model-eval" / "heldout.json").read_text())
    assert heldout["settings"]["max_sequences"] == 2
    for row in heldout["rows"]:
        assert row | {"stage": "final"} == of_run[row["source"], row["modality"]]
    assert len(heldout["rows"]) == len(of_run)
    again = json.loads((tmp_path / "model-eval" / "reconstruction.json").read_text())["rows"]
    assert again == report["reconstruction"]


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_measured_is_a_hole_that_the_next_call_tries_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xff\xfe\x00")
    command = ["eval", "needle", str(home / "model"), "--out", str(tmp_path / "out"), *NEEDLE]
    command += ["--set", f"text={tmp_path}/book.txt"]
    assert main(command) == 0
    assert "  hole needle-256-0: evaluate.text: no text can be read" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert (figures["rows"], [hole["cell"] for hole in figures["holes"]]) == ([], ["needle-256-0", "needle-256-1"])
    assert list((tmp_path / "out").rglob("partitions/*")) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["needl", "MODEL"], "needl: no such task; name some of heldout, needle"),
        (["needle", "MODEL-x"], "no exported model is there; make one by `ringworld export RUN --out DIR`"),
        (["needle", "MODEL"], "needle: evaluate.needle is not there; set needle.contexts"),
        (["needle", "MODEL", *NEEDLE], "needle: there is no text to hide anything in; set evaluate.text to text files"),
        (["needle", "MODEL", *NEEDLE, "--set", "text=no.txt"], "no.txt: no such file or object; name text files that"),
        (
            ["needle", "MODEL", "--set", "needle.contexts=[20]", "--set", "text=TEXT"],
            "20 tokens leave no room for text",
        ),
        (["needle", "MODEL", "--set", "needle.context=[20]"], "unknown key 'evaluate.needle.context'; did you"),
        (["needle", "MODEL", "--set", "sp=2"], "evaluate.sp 2 does not divide evaluate.resources.workers 1"),
        (["heldout", "MODEL"], "heldout: held-out sequences are those of a run; give its recipe by --recipe"),
        (["generation", "MODEL", "--set", "generation.frames=1"], "generation: there is no held-out video to continue"),
        (["needle", "MODEL", "--recipe", "no.yaml"], "no.yaml: no such recipe file"),
        (["needle", "MODEL", *NEEDLE, "--set", "text=TEXT", "--out", "http://host/x"], "this can be read at most"),
    ],
)
def test_a_users_mistake_is_one_sentence_before_anything_runs(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    named = {"MODEL": f"{home}/model", "TEXT": f"{home}/data/held-a.txt"}
    words = [word.replace("MODEL", named["MODEL"]).replace("TEXT", named["TEXT"]) for word in arguments]
    assert main(["eval", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ringworld: ")
    assert reason in said
    assert not (home / "model-eval").exists()


def test_a_recipe_of_another_vocabulary_is_refused(
    home: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    tree["text_tokenizer"] = {"path": f"{sources}/tokenizer.json"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    assert main(["eval", "heldout", f"{home}/model", "--recipe", str(tmp_path / "other.yaml")]) == 2
    assert "give the recipe that the model was trained by" in capsys.readouterr().err
