"""Steps that would harm the model: a real stage over shards in which a few sequences are noise."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.training.engine import StepMetrics, TargetLoss
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import record_json
from pipelines.pack.record import PackOutputs, PackRecord
from pipelines.recipe import BadSteps
from pipelines.train.bad_steps import BadStepWatch
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import read_metrics
from pipelines.train.run import train_stage
from storage.errors import UserError
from storage.store import Store
from testing.packed_shards import CONTEXT
from testing.tiny_run import VOCABULARY
from tests.pipelines.train.test_bad_shards import recipe_of
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

STEPS, BATCH = 40, 2
SEQUENCES, NOISE = 90, range(60, 62)


def packed(store: Store) -> PackRecord:
    """One shard of sequences that say the same word over and over, but for a few."""
    rng = np.random.default_rng(5)

    def tokens(number: int) -> np.ndarray:
        noise = rng.integers(3, 32000, CONTEXT).astype(np.int32)
        return noise if number in NOISE else np.full(CONTEXT, 77, np.int32)

    documents = (Document(f"b{n}", "books", tokens(n), ((1, CONTEXT),)) for n in range(SEQUENCES))
    with store.writing("shards/0.tar") as file:
        sequences = islice(pack(documents, CONTEXT, VOCABULARY, "text", window=1), SEQUENCES)
        stats = write_shard(file, sequences, VOCABULARY)
    shard_set = ShardSet(CONTEXT, VOCABULARY, "text", ("shards/0.tar",), (stats,))
    write_set(store, "sets/books-train.json", shard_set)
    return PackRecord(PackOutputs({"books": {"train": {"file": "sets/books-train.json"}}}))


def trained(folder: Path, **bad_steps: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the stage says of itself, and its steps."""
    shards, store = Store(str(folder / "pack")), Store(str(folder / "train"))
    record = packed(shards)
    tree = recipe_of(folder, 0).model_dump(mode="json")
    stage = {**tree["train"]["stages"][0], "steps": STEPS, "batch_tokens": BATCH * CONTEXT, "lr": 0.03}
    tree["train"] |= {"workers": 1, "checkpoint_steps": 4, "stages": [stage], "bad_steps": bad_steps}
    tree["train"]["deterministic"] = True
    recipe = type(recipe_of(folder, 0)).model_validate(tree)
    with bar("train-text", STEPS, "step") as line:
        done = train_stage(TrainJob(recipe, recipe.train.stages[0], VOCABULARY, shards, record, None, store), line)
    return record_json(done)["figures"], list(read_metrics(store))


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_spike_is_skipped_or_rolled_back_and_counted(tmp_path: Path) -> None:
    figures, steps = trained(tmp_path / "skip", action="skip", spike_sigmas=5, window=6)
    assert torch.are_deterministic_algorithms_enabled()
    dropped = [step["step"] for step in steps if "dropped" in step]
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert figures["dropped_steps"] == len(dropped) > 0
    for number in dropped:
        assert steps[number]["grad_norm"] is None
        assert steps[number]["loss"] > 5 > steps[number - 1]["loss"]
        assert steps[number]["dropped"].startswith("the loss ")
    assert figures["last_loss"] < 5

    figures, rolled = trained(tmp_path / "rollback", action="rollback", spike_sigmas=5, window=6)
    assert [step["step"] for step in rolled] == list(range(STEPS)), "no step is listed twice"
    first = dropped[0]
    assert figures["rolled_back"][0][0] == first
    assert max(step["loss"] for step in rolled[first:]) < 5, "its batch is not trained on, nor met again"
    back = first - first % 4
    assert list(map(untimed, rolled[:back])) == list(map(untimed, steps[:back]))
    assert rolled[back]["loss"] == pytest.approx(steps[first + 1]["loss"], rel=1), "on with the batch after the bad one"


def untimed(step: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name != "machine" and not name.endswith("seconds")}


def step_of(number: int, loss: float = 2.0, grad_norm: float = 1.0) -> StepMetrics:
    parts = {"text": TargetLoss(loss, nats=1.0, targets=1)}
    return StepMetrics(loss, parts, (), tokens=64, seconds=0.1, step=number, lr=0.1, grad_norm=grad_norm)


def test_a_gradient_that_is_not_finite_is_a_bad_step_and_so_many_are_put_up_with() -> None:
    watch = BadStepWatch(BadSteps(at_most=2), "train-text")
    assert watch.is_spike is None
    assert watch.judge(step_of(0)) == ("good", "")
    assert watch.judge(step_of(1, grad_norm=math.inf)) == ("skip", "the gradient is not finite")
    again = BadStepWatch(BadSteps(at_most=2), "train-text")
    again.restore(watch.state)
    assert again.judge(step_of(2, loss=math.nan, grad_norm=math.nan)) == ("skip", "the loss is not finite")
    with pytest.raises(UserError, match=r"^train-text: step 3, bad step number 3: the gradient is not finite; look at"):
        again.judge(step_of(3, grad_norm=math.nan))


def test_fail_ends_the_stage_at_the_first() -> None:
    with pytest.raises(UserError, match=r"^train-text: step 5: the gradient is not finite"):
        BadStepWatch(BadSteps(action="fail"), "train-text").judge(step_of(5, grad_norm=math.nan))


def test_going_back_forgets_the_losses_since_but_not_the_bad_steps() -> None:
    watch = BadStepWatch(BadSteps(spike_sigmas=3, window=4), "train-text")
    for number in range(4):
        watch.judge(step_of(number, loss=2.0))
    saved = watch.state
    watch.judge(step_of(4, loss=2.01))
    verdict, why = watch.judge(step_of(5, loss=9.0, grad_norm=math.nan))
    assert (verdict, why) == ("skip", "the loss 9 spikes above 2.063")
    watch.restore(saved)
    assert watch.state == {"count": 1, "losses": [2.0] * 4}
