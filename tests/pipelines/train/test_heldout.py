"""Held-out loss while a stage trains: what is measured, that it changes nothing, which checkpoint is the best."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from model.inference.scoring import score_batches
from model.llama.llama import load_llama
from model.training.engine import TrainingEngine
from model.training.mesh import build_mesh
from pipelines.cluster.progress import bar
from pipelines.pack.record import PackOutputs, PackRecord
from pipelines.recipe import Recipe
from pipelines.train.best_checkpoint import best_checkpoint
from pipelines.train.data import stage_dispatcher
from pipelines.train.engine_setup import engine_settings, initial_weights, schedule
from pipelines.train.heldout import Heldout, Measured, better
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import read_metrics, whole_seconds
from pipelines.train.record import TrainRecord
from pipelines.train.run import train_stage
from pipelines.train.samples import kinds
from storage.store import Store
from testing.packed_shards import CONTEXT, HELDOUT, packed
from testing.tensorboard_events import shown_by_tensorboard, shown_of
from testing.tiny_run import VOCABULARY
from tests.model.attention_groups import run_in_processes
from tests.pipelines.train.test_bad_shards import recipe_of
from tokenization.loader.join import join_sequences
from tokenization.shards.chosen_sequences import read_sequences

STEPS = 7
SPLITS = ("train", "heldout")
MEASURED = {"steps": 2, "max_sequences": 3, "sample_tokens": 6}


def recipe(folder: Path, lr: float = 3e-3, **train: Any) -> Recipe:
    tree = recipe_of(folder, 0).model_dump(mode="json")
    stage = {**tree["train"]["stages"][0], "steps": STEPS, "batch_tokens": 2 * CONTEXT, "lr": lr}
    tree["train"] |= {"stages": [stage], "checkpoint_steps": 2, **train}
    return Recipe.model_validate(tree)


def trained(recipe: Recipe, store: Store, splits: tuple[str, ...] = SPLITS) -> TrainRecord:
    shards = Store(str(Path(store.url).parent / "pack"))
    record, _ = packed(shards)
    record = PackRecord(PackOutputs({"books": {split: record.outputs.sets["books"][split] for split in splits}}))
    with bar("train-text", STEPS, "step") as line:
        return train_stage(TrainJob(recipe, recipe.train.stages[0], VOCABULARY, shards, record, None, store), line)


def weights(store: Store) -> bytes:
    return Path(store.path("model/model.safetensors")).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_it_is_measured_on_the_same_sequences_and_leaves_the_training_to_the_bit(tmp_path: Path) -> None:
    plain, watched = Store(str(tmp_path / "plain")), Store(str(tmp_path / "watched"))
    trained(recipe(tmp_path), plain)
    record = trained(recipe(tmp_path, heldout=MEASURED), watched)
    assert weights(watched) == weights(plain)
    lines = list(read_metrics(watched))
    assert [(one["step"], one["loss"], one["grad_norm"]) for one in lines] == [
        (one["step"], one["loss"], one["grad_norm"]) for one in read_metrics(plain)
    ]
    measured = {line["step"] + 1: line["heldout"] for line in lines if "heldout" in line}
    assert list(measured) == [2, 4, 6, STEPS]
    assert len({one["text_targets"] for one in measured.values()}) == 1

    # The last is that of the exported model, which the evaluation would measure.
    shards = Store(str(tmp_path / "pack"))
    heldout = packed(shards)[0].read_set(shards, "books", "heldout")
    assert len(heldout) == HELDOUT
    batches = (join_sequences([one]) for one in read_sequences(shards, heldout, [0, 2, 4]))
    nats, targets = score_batches(load_llama(watched.path("model")), batches).of("text")
    last = measured[STEPS]
    assert (last["text_nats"], last["text_targets"]) == (pytest.approx(nats, rel=1e-5), targets)
    assert last["sources"] == {"books": {"targets": targets, "nats_per_token": pytest.approx(nats / targets, rel=1e-5)}}

    for one in measured.values():
        (sample,) = one["samples"]
        assert sample["source"] == "books"
        assert len(sample["sample"]) == len(sample["document"]) == MEASURED["sample_tokens"]
        assert max(sample["sample"]) < VOCABULARY.text_size
    shown = shown_by_tensorboard(tmp_path / "watched" / "tensorboard")
    assert shown == shown_of(lines)
    assert [step for step, _ in shown["heldout_loss"]] == [1, 3, 5, 6]
    assert {"heldout_text_nats_per_token", "source/books/heldout_nats_per_token", "heldout_seconds"} <= set(shown)
    assert all(whole_seconds(line) > line["machine"]["step_seconds"] for line in lines if "heldout" in line)
    step, best = min(measured.items(), key=lambda one: one[1]["loss"])
    assert record.figures.best == {"step": step, "loss": best["loss"], "targets": targets}


def measured_by(group: Any, folder: str) -> list[Measured]:
    """By two ranks that have a sequence each, and by two that share each sequence, at ZeRO 1 and 3."""
    found = []
    for sp, zero in ((1, 1), (2, 3)):
        mesh = build_mesh(sp)
        shards, settings = Store(f"{folder}/pack"), recipe(Path(folder), zero=zero, heldout=MEASURED)
        record = PackRecord(PackOutputs({"books": {one: {"file": f"sets/books-{one}.json"} for one in SPLITS}}))
        job = TrainJob(settings, settings.curriculum[0], VOCABULARY, shards, record, None, Store(folder))
        config = engine_settings(job.recipe.training, job.stage, mesh.dp)
        engine = TrainingEngine(initial_weights(job), mesh, config, schedule(job.stage))
        dispatcher = stage_dispatcher(job, mesh, engine.model.config)
        found.append(Heldout(settings.training.heldout, job, engine, dispatcher).measure())
        engine.close()
    return found


@pytest.mark.slow
def test_the_loss_is_the_same_however_the_ranks_share_the_sequences(tmp_path: Path) -> None:
    packed(Store(str(tmp_path / "pack")))
    ranks = run_in_processes(measured_by, 2, str(tmp_path))
    (apart, together), (apart_there, together_there) = ranks
    assert (apart.loss, together.loss) == (apart_there.loss, together_there.loss)
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    assert apart.targets == together.targets == 3 * 39, "a document of 40 tokens in each sequence"
    assert "samples" in apart.line
    assert "samples" not in together.line, "at ZeRO 3"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_best_checkpoint_stays_when_the_training_goes_astray(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "train"))
    record = trained(recipe(tmp_path, lr=1.0, heldout={"steps": 2}, keep_checkpoints=1), store)
    losses = {line["step"] + 1: line["heldout"]["loss"] for line in read_metrics(store) if "heldout" in line}
    best = min(losses, key=losses.get)
    assert best < STEPS, "it went astray"
    assert sorted(path.name for path in (tmp_path / "train" / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (best, STEPS)
    ]
    assert best_checkpoint(store.at("checkpoints")) == record.figures.best
    assert record.figures.best["step"] == best


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_stage_whose_sources_hold_nothing_out_says_so_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path / "train"))
    with caplog.at_level(logging.WARNING, "ringworld"):
        record = trained(recipe(tmp_path, heldout=MEASURED), store, ("train",))
    assert "train-text: nothing is held out of its sources, so train.heldout is not measured" in caplog.text
    assert record.figures.best is None
    assert not any("heldout" in line for line in read_metrics(store))


def test_the_best_is_the_least_loss_of_the_same_targets() -> None:
    def measured(loss: float, targets: int = 9) -> Measured:
        return Measured(loss, targets, {}, 0.0)

    best = better(None, 2, measured(4.0))
    assert best == {"step": 2, "loss": 4.0, "targets": 9}
    assert better(best, 4, measured(4.5)) == best
    assert better(best, 4, measured(float("nan"))) == best
    assert better(best, 4, measured(3.0))["step"] == 4
    assert better(best, 4, measured(9.0, targets=10))["step"] == 4, "of other sequences"


def test_checkpoints_and_measurements_have_to_meet(tmp_path: Path) -> None:
    for steps in (50, 100, 200):
        assert recipe(tmp_path, heldout={"steps": steps}, checkpoint_steps=100).training.heldout is not None
    with pytest.raises(ValidationError, match=r"heldout\.steps 40 and checkpoint_steps 100: neither is a multiple"):
        recipe(tmp_path, heldout={"steps": 40}, checkpoint_steps=100)


def test_what_is_drawn_decodes_whatever_the_model_has_learnt() -> None:
    frame = VOCABULARY["vision"].codes_to_ids(np.array([3, 60]))
    document = np.array([17, *frame, VOCABULARY.eof_id, *frame, VOCABULARY.eov_id, VOCABULARY.eos_id])
    text, codes = range(VOCABULARY.text_size), range(VOCABULARY.text_size, VOCABULARY.text_size + 64)
    eof, eov = (range(one, one + 1) for one in (VOCABULARY.eof_id, VOCABULARY.eov_id))
    assert list(kinds(document, VOCABULARY)) == [text, codes, codes, eof, codes, codes, eov, text]
