"""What is watched of a train stage: figures by hand, and every sink told the same."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.llama.config import llama_config
from model.training.engine import LossMetrics, StepMetrics, TargetLoss
from pipelines.build import build_stages
from pipelines.recipe import Recipe
from pipelines.recipe.train import Wandb
from pipelines.train.heldout import heldout_line
from pipelines.train.job import TrainJob
from pipelines.train.metrics.files import remove_uncommitted, write_events
from pipelines.train.metrics.machine import device_peak, memory, part_figures, speed
from pipelines.train.metrics.monitor import move_bar
from pipelines.train.metrics.steps import (
    HeldSteps,
    read_metrics,
    step_figures,
    step_line,
    tokens_per_second,
    whole_seconds,
    write_metrics,
)
from pipelines.train.metrics.wandb import WeightsAndBiases, check_wandb
from pipelines.train.profiled_steps import ProfiledSteps
from storage.errors import UserError
from storage.store import Store
from testing.tensorboard_events import shown_by_tensorboard, shown_of
from testing.tiny_run import tiny_recipe

SIZES = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def metrics(step: int = 0) -> StepMetrics:
    return StepMetrics(
        loss=3.0,
        modalities={"text": TargetLoss(2.0, 60.0, 20), "vision": TargetLoss(1.0, 8.0, 4)},
        tokens=64,
        seconds=1.5,
        useful_tokens=48,
        useful_pairs=300,
        sources=(TargetLoss(2.5, 50.0, 16), TargetLoss(0.5, 18.0, 8), TargetLoss(0.0, 0.0, 0)),
        step=step,
        lr=1e-3,
        grad_norm=0.25,
    )


def line_of(step: int) -> dict:
    machine = {"tokens_per_second": 32.0 + step, "loader_stall_seconds": 0.5, "mfu": 0.4}
    line = step_line(metrics(step), ("books", "clips", "none"), machine)
    return {**line, "lost_tokens": 7} if step == 1 else line


def test_a_steps_line_names_its_sources() -> None:
    line = line_of(1)
    assert line["sources"] == {
        "books": {"loss": 2.5, "targets": 16, "nats_per_token": 50 / 16},
        "clips": {"loss": 0.5, "targets": 8, "nats_per_token": 18 / 8},
        "none": {"loss": 0.0, "targets": 0},
    }
    assert not [name for name in line if name.startswith("source_")]
    assert line == json.loads(json.dumps(line))
    figures = step_figures(line)
    assert figures["source/clips/nats_per_token"] == 18 / 8
    assert (figures["text_nats_per_token"], figures["vision_nats_per_token"]) == (3.0, 2.0)
    assert (figures["tokens_per_second"], figures["lost_tokens"]) == (33.0, 7)
    assert "source/none/nats_per_token" not in figures
    assert all(isinstance(value, float | int) for value in figures.values())


def test_a_dropped_steps_norm_is_null_and_shown_nowhere() -> None:
    line = step_line(dataclasses.replace(metrics(), grad_norm=math.nan), ("books",), {})
    assert line["grad_norm"] is None
    assert "grad_norm" not in step_figures(line)


def test_speed_and_utilisation_by_hand() -> None:
    config = llama_config(SIZES, {"text": 70, "vision": 30}, 64, 1e4)
    weights = 4 * 4 * 4 + 3 * 4 * 8
    flops = 3 * (2 * weights * 48 + 4 * 4 * 300 + 2 * 4 * (20 * 70 + 4 * 30))
    assert speed(metrics(), 2.0, config, peak=1e6) == {
        "step_seconds": 2.0,
        "tokens_per_second": 32.0,
        "useful_tokens_per_second": 24.0,
        "mfu": pytest.approx(flops / 2e6),
    }
    assert "mfu" not in speed(metrics(), 2.0, config, peak=None)


def test_a_stages_speed_counts_waiting_for_batches_and_for_checkpoints() -> None:
    steps = [step_line(metrics(step), ("books",), {"step_seconds": 2.0}) for step in range(3)]
    steps[1]["checkpoint_seconds"] = 0.5
    assert [whole_seconds(step) for step in steps] == [2.0, 2.5, 2.0]
    assert tokens_per_second(steps) == 3 * 64 / 6.5
    assert whole_seconds(step_line(metrics(), ("books",), {})) == 1.5, "as older runs have it"


def test_the_recipes_peak_comes_first_and_a_cpu_has_none() -> None:
    assert device_peak(5e12) == 5e12
    assert device_peak(None) is None


def test_parts_by_name() -> None:
    assert part_figures({"load": 0.0, "forward": 2.0}) == {"loader_stall_seconds": 0.0, "forward_seconds": 2.0}


def test_memory_is_in_bytes() -> None:
    held = memory()
    assert 2**25 < held["memory_resident_bytes"] <= held["memory_peak_bytes"] * 1.01 < 2**37


def held_steps(store: Store) -> HeldSteps:
    """Steps that go to both folders of a stage."""
    return HeldSteps(
        [lambda steps: write_metrics(store, [step.line for step in steps]), lambda steps: write_events(store, steps)]
    )


def test_files_list_each_step_once_whatever_was_killed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def train(first: int, end: int, committed: tuple[int, ...]) -> None:
        remove_uncommitted(store, first)
        held = held_steps(store)
        for step in range(first, end):
            held.add(line_of(step), step_figures(line_of(step)))
            if step + 1 in committed:
                held.take()(0.25)

    train(0, 5, (2, 4))  # step 4 is lost by a kill; and say that the checkpoint after step 3 was never committed
    train(2, 8, (5, 8))
    lines = list(read_metrics(store))
    assert [line["step"] for line in lines] == list(range(8))
    assert shown_by_tensorboard(tmp_path / "tensorboard") == shown_of(lines)
    assert len(shown_of(lines)["loss"]) == 8
    assert [line["step"] for line in lines if line.get("checkpoint_seconds") == 0.25] == [1, 4, 7]


def test_steps_that_will_be_done_again_can_be_discarded(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    held = held_steps(store)
    for step in (0, 1, 1, 2):
        held.add(line_of(step), step_figures(line_of(step)))
        if step == 1:
            held.discard()
    held.take()(0.25)
    assert [line["step"] for line in read_metrics(store)] == [2]
    assert [step for step, _ in shown_by_tensorboard(tmp_path / "tensorboard")["loss"]] == [2]


def test_a_held_out_loss_is_added_to_the_step_before_it_and_shown_beside_its_figures(tmp_path: Path) -> None:
    store, measured = (
        Store(str(tmp_path)),
        LossMetrics(
            loss=2.5,
            modalities={"text": TargetLoss(2.5, 30.0, 12), "vision": TargetLoss(0.0, 0.0, 0)},
            sources=(TargetLoss(2.5, 30.0, 12), TargetLoss(0.0, 0.0, 0)),
            tokens=32,
            seconds=9.0,
        ),
    )
    held = held_steps(store)
    for step in range(2):
        held.add(line_of(step), step_figures(line_of(step)))
        if step == 0:
            held.amend(heldout_line(measured, ("books", "clips")), 0.75)
    held.take()(0.25)
    first, second = read_metrics(store)
    assert first["heldout"]["sources"] == {"books": {"targets": 12, "nats_per_token": 2.5}, "clips": {"targets": 0}}
    assert "heldout" not in second
    shown = shown_by_tensorboard(tmp_path / "tensorboard")
    expected = {"heldout_loss": 2.5, "heldout_text_nats_per_token": 2.5, "source/books/heldout_nats_per_token": 2.5}
    assert {name: points for name, points in shown.items() if "heldout" in name} == {
        name: [(0, value)] for name, value in {**expected, "heldout_seconds": 0.75}.items()
    }
    assert whole_seconds(first) == whole_seconds(second) - 0.25 + 0.75


def test_the_bar_shows_loss_speed_utilisation_and_stall() -> None:
    told = []
    report = SimpleNamespace(remote=lambda step, figures: told.append((step, figures)))
    move_bar(SimpleNamespace(report=report), line_of(3), step_figures(line_of(3)))
    assert told == [(4, {"loss": 3.0, "tokens_per_second": 35.0, "mfu": 0.4, "loader_stall_seconds": 0.5})]


@pytest.mark.parametrize(
    ("text", "steps"), [("3:7", (3, 7)), ("0:1", (0, 1)), ("4", (1, 5)), ("5:5", None), ("0", None), ("a", None)]
)
def test_steps_to_profile(text: str, steps: tuple[int, int] | None) -> None:
    if steps is None:
        with pytest.raises(UserError, match=f"--profile {text}: give steps as A:B"):
            ProfiledSteps.parse(text)
    else:
        parsed = ProfiledSteps.parse(text, all_ranks=True)
        assert (parsed.first, parsed.end, parsed.all_ranks) == (*steps, True)


def test_watching_is_no_part_of_what_a_stage_makes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.mp4", "held.txt", "held.mp4"):
        (tmp_path / "data" / name).write_text("x")
    recipe = tiny_recipe(tmp_path)
    recipe = recipe.model_copy(update={"vqgan": recipe.vqgan.model_copy(update={"weights": f"{tmp_path}/data/a.txt"})})
    hardware = dataclasses.replace(recipe.train.hardware, peak_flops=1e12)
    watched = dataclasses.replace(recipe.train, tensorboard=False, wandb=Wandb(project="p"), hardware=hardware)
    closely = recipe.model_copy(update={"train": watched})
    settings = [{stage.name: stage.settings() for stage in build_stages(one)} for one in (recipe, closely)]
    assert settings[0] == settings[1]
    changed = recipe.model_copy(update={"train": dataclasses.replace(watched, weight_decay=0.5)})
    assert {stage.name: stage.settings() for stage in build_stages(changed)} != settings[0]


def with_wandb(tmp_path: Path, **wandb: str) -> Recipe:
    recipe = tiny_recipe(tmp_path)
    train = dataclasses.replace(recipe.train, wandb=Wandb.model_validate({"project": "p", **wandb}))
    return recipe.model_copy(update={"train": train})


def test_without_wandb_its_user_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.wandb: the package wandb is not installed; pip install"):
        check_wandb(with_wandb(tmp_path))
    check_wandb(with_wandb(tmp_path, mode="disabled"))
    check_wandb(tiny_recipe(tmp_path))


def test_wandb_without_a_key_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed: its sink is not tested")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"train\.wandb: there is no API key; run `wandb login`"):
        check_wandb(with_wandb(tmp_path))
    check_wandb(with_wandb(tmp_path, mode="offline"))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check_wandb(with_wandb(tmp_path))


def wandb_job(recipe: Recipe, folder: Path) -> TrainJob:
    store = Store(str(folder))
    return TrainJob(recipe, recipe.train.stages[0], None, store, {}, None, store)


def test_wandb_hears_of_steps_with_their_checkpoint_and_never_of_discarded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr("time.time", lambda: 7.0)
    run = SimpleNamespace(log=lambda figures, step, commit: heard.append((step, figures)))
    stub = SimpleNamespace(init=lambda **settings: run, Settings=lambda **settings: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    held = HeldSteps([WeightsAndBiases(wandb_job(with_wandb(tmp_path), tmp_path)).publish])
    for step, loss in ((0, 5.0), (1, 4.0), (2, 99.0), (1, 4.0), (2, 3.0)):
        held.add({"step": step}, {"loss": loss})
        if step == 0:
            held.take()(0.25)
        if loss == 99.0:
            assert heard == [(0, {"loss": 5.0, "_timestamp": 7.0, "checkpoint_seconds": 0.25})]
            held.discard()
    held.take()(0.5)
    held.take()(0.5)
    assert [(step, figures["loss"]) for step, figures in heard] == [(0, 5.0), (1, 4.0), (2, 3.0)]


def test_wandb_offline_keeps_every_step_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb is not installed: its sink is not tested")
    job = wandb_job(with_wandb(tmp_path, mode="offline", folder=str(tmp_path)), tmp_path)
    ids = []
    for first, end in ((0, 2), (2, 4)):  # as if started again
        sink = WeightsAndBiases(job)
        held = HeldSteps([sink.publish])
        for step in range(first, end):
            held.add(line_of(step), step_figures(line_of(step)))
        held.take()(0.25)
        ids.append(sink._run.id)
        assert sink._run.summary["source/clips/loss"] == 0.5
        assert sink._run.summary["tokens_per_second"] == 32.0 + end - 1
        sink.close()
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
