"""The undisturbed run, as it was watched: by source, in TensorBoard, with a trace of the steps asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.train.metrics.steps import read_metrics, step_figures
from storage.store import Store
from testing.tensorboard_events import shown_by_tensorboard, shown_of

pytestmark = pytest.mark.slow


def stage(root: Path, name: str) -> Path:
    (folder,) = (root / "stages" / name).iterdir()
    return folder


@pytest.fixture(scope="module")
def lines(undisturbed: Path) -> list[dict]:
    return list(read_metrics(Store(str(stage(undisturbed, "train-video")))))


def test_the_losses_of_the_sources_sum_to_the_loss(lines: list[dict]) -> None:
    for line in lines:
        assert list(line["sources"]) == ["acts", "clips"]
        assert sum(source["loss"] for source in line["sources"].values()) == pytest.approx(line["loss"], rel=1e-5)
        targets = sum(source["targets"] for source in line["sources"].values())
        assert targets == line["text_targets"] + line["vision_targets"]
    assert all(any(line["sources"][name]["targets"] for line in lines) for name in ("acts", "clips"))


def test_every_step_has_the_figures_of_the_machine(lines: list[dict]) -> None:
    for line in lines:
        machine = line["machine"]
        assert 0 < machine["mfu"] < 1
        assert 0 < machine["useful_tokens_per_second"] <= machine["tokens_per_second"]
        assert machine["communication_seconds"] < machine["forward_seconds"] + machine["backward_seconds"]
        assert machine["update_seconds"] > 0 <= machine["loader_stall_seconds"]
        assert machine["memory_peak_bytes"] > 2**26
    assert [line["step"] for line in lines if "checkpoint_seconds" in line] == [2, 3]


def test_tensorboard_shows_what_the_metrics_say(undisturbed: Path, lines: list[dict]) -> None:
    shown = shown_by_tensorboard(stage(undisturbed, "train-video") / "tensorboard")
    assert shown == shown_of(lines)
    assert {"loss", "mfu", "source/clips/loss", "loader_stall_seconds"} <= set(shown)
    assert set(step_figures(lines[0])) <= set(shown)


def test_the_steps_asked_for_are_traced_on_the_first_rank(undisturbed: Path) -> None:
    for name in ("train-text", "train-video"):
        folder = stage(undisturbed, name)
        assert [path.name for path in (folder / "profile").iterdir()] == ["steps-1-3-rank-0.json"]
        trace = json.loads((folder / "profile" / "steps-1-3-rank-0.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        layers, micro_batches, steps = 2, 2, 2
        assert names.count("_PackedRingAttention") == layers * micro_batches * steps
