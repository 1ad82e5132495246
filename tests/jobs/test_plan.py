"""`ringworld plan` says what will run and why; `ringworld run` then runs that and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from testing.miniature import ringworld

pytestmark = pytest.mark.slow

ALL = ["sources", "vqgan", "tokenize", "pack-text", "train-text", "pack-video", "train-video", "evaluate", "report"]


@pytest.fixture
def plan(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """By stage: why it will run, or nothing when it is done."""

    def reasons(*overrides: str) -> dict[str, list[str]]:
        arguments = [argument for override in overrides for argument in ("--set", override)]
        assert main(["plan", str(undisturbed.parent / "recipe.yaml"), "--json", *arguments]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["stage"] for row in rows] == ALL
        assert all((row["status"] == "done") == (not row["reasons"]) for row in rows)
        return {row["stage"]: row["reasons"] for row in rows if row["reasons"]}

    return reasons


def test_after_a_run_everything_is_done(plan: Any) -> None:
    assert plan() == {}


def test_a_changed_setting_runs_what_depends_on_it_and_says_which(plan: Any) -> None:
    assert plan("train.stages.1.lr=3e-3") == {
        "train-video": ["setting stage.lr: 0.01 -> 0.003"],
        "evaluate": ["input train-video changed"],
        "report": ["input train-video changed", "input evaluate changed"],
    }
    changed = plan("train.stages.0.context=64")
    assert set(changed) == set(ALL) - {"sources", "vqgan", "tokenize", "pack-video"}
    assert changed["pack-text"] == ["setting context: 128 -> 64"]
    changed = plan("tokenize.fps=6")
    assert set(changed) == set(ALL) - {"sources", "vqgan"}
    assert changed["tokenize"] == ["setting tokenize.fps: 12.0 -> 6.0"]
    assert changed["pack-text"] == ["input tokenize changed"]


def test_settings_that_change_only_the_speed_run_nothing(plan: Any) -> None:
    faster = ["tokenize.decode.workers=4", "tokenize.encode.workers=2", "pack.pool.cpus=2", "train.max_restarts=1"]
    measured = ["train.checkpoint_steps=6", "train.heldout.steps=2", "train.heldout.max_sequences=1"]
    assert plan(*faster, *measured, "evaluate.resources.workers=3") == {}


def test_an_added_object_runs_nothing_that_has_been_trained_and_reaches_the_next_training(
    plan: Any, sources: Path
) -> None:
    added = sources / "acts" / "act-10.md"
    added.write_text("Enter a new ghost.\n")
    try:
        assert plan() == {}
        changed = plan("train.stages.1.lr=3e-3")
    finally:
        added.unlink()
    assert set(changed) == set(ALL) - {"vqgan", "pack-text", "train-text"}
    assert "setting acts.objects: 9 -> 10" in changed["sources"]
    assert changed["tokenize"] == ["input sources changed"]
    assert changed["train-video"] == ["input pack-video changed", "setting stage.lr: 0.01 -> 0.003"]
    assert plan() == {}


def test_the_plan_for_readers_has_a_line_a_stage_and_a_line_a_reason(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(undisturbed.parent / "recipe.yaml"), "--set", "evaluate.max_sequences=1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line[0] in ALL] == [
        *([name, "done"] for name in ALL[:-2]),
        ["evaluate", "run"],
        ["report", "run"],
    ]
    assert ["setting", "evaluate.max_sequences:", "2", "->", "1"] in lines


def test_a_run_with_a_changed_setting_leaves_all_else_untouched(undisturbed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in root.glob("stages/*/*/**/*") if path.is_file()}
    changed = ["--set", f"storage.root={root}", "--set", "name=renamed"]
    done = ringworld("run", undisturbed.parent / "recipe.yaml", *changed)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in root.glob("stages/*/*/**/*") if path.is_file()}
    assert {path: when for path, when in after.items() if path in before} == before
    assert {path.relative_to(root).parts[1] for path in set(after) - set(before)} == {"report"}
