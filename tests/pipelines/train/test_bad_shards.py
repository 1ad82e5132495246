"""Shards that rot after packing: they end a train stage, or are skipped alike by all ranks with the loss on record."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from model.training.mesh import Mesh
from model.training.rank_batch import Dispatcher
from pipelines.cluster.progress import bar
from pipelines.recipe import Recipe
from pipelines.train.bad_shards import RECORD, bad_shards
from pipelines.train.data import rank_batches
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import read_metrics
from pipelines.train.run import bad_data_as_user_error, train_stage
from storage.errors import UserError
from storage.store import Store
from testing.packed_shards import BATCH, CONTEXT, PER_SHARD, STEPS, packed
from testing.tiny_run import VOCABULARY, tiny_recipe


def damage(store: Store, name: str) -> None:
    """One bit in every block of the file, headers of the tar excepted at its beginning."""
    path = Path(store.path(name))
    body = np.frombuffer(path.read_bytes(), np.uint8).copy()
    body[700::512] ^= 4
    path.write_bytes(body.tobytes())


def recipe_of(folder: Path, max_bad_shards: int) -> Recipe:
    tree = tiny_recipe(folder).model_dump(mode="json")
    stage = {**tree["train"]["stages"][0], "context": CONTEXT, "steps": STEPS, "batch_tokens": BATCH * CONTEXT}
    tree["train"] |= {"max_restarts": 0, "max_bad_shards": max_bad_shards, "stages": [stage]}
    tree["evaluate"] |= {"needle": None, "generation": None}
    return Recipe.model_validate(tree)


def test_a_corrupt_shard_ends_the_stage_and_is_named_with_its_hash_and_the_remedy(tmp_path: Path) -> None:
    shards, recipe = Store(str(tmp_path / "pack")), recipe_of(tmp_path, 0)
    record, _ = packed(shards)
    damage(shards, "shards/2.tar")
    job = TrainJob(recipe, recipe.train.stages[0], VOCABULARY, shards, record, None, shards)
    said = (
        r"^train-text: shard shards/2\.tar: sequence .* is corrupt: .*the shard's sha256 is [0-9a-f]{64}, the manifest "
        r"says [0-9a-f]{64}.*set train\.max_bad_shards and run again$"
    )
    with pytest.raises(UserError, match=said), bad_data_as_user_error("train-text"):
        list(islice(rank_batches(job, Mesh(dp=1, sp=1, rank=0, sp_group=None), Dispatcher(), None), STEPS))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_bad_shard_that_is_tolerated_is_skipped_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    shards, store, recipe = Store(str(tmp_path / "pack")), Store(str(tmp_path / "train")), recipe_of(tmp_path, 1)
    record, _ = packed(shards)
    damage(shards, "shards/2.tar")
    with bar("train-text", STEPS, "step") as line:
        done = train_stage(TrainJob(recipe, recipe.train.stages[0], VOCABULARY, shards, record, None, store), line)
    # 40 positions over 32 sequences: every sequence once, some twice.
    steps = list(read_metrics(store))
    lost = [step.get("lost_sequences", 0) for step in steps]
    assert PER_SHARD <= sum(lost) <= 2 * PER_SHARD
    assert [step.get("lost_tokens", 0) for step in steps] == [CONTEXT * n for n in lost]
    assert done.figures.bad_shards == ("shards/2.tar",)
    assert (done.figures.lost_sequences, done.figures.lost_tokens) == (sum(lost), CONTEXT * sum(lost))
    assert all(np.isfinite(step["loss"]) for step in steps)
    assert [step["tokens"] for step in steps] == [BATCH * CONTEXT] * STEPS, "padding keeps the geometry"
    (record,) = store.read_json(RECORD)
    assert (record["name"], record["sequences"], record["tokens"]) == ("shards/2.tar", PER_SHARD, PER_SHARD * CONTEXT)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_is_skipped_is_decided_once_and_within_what_is_tolerated(tmp_path: Path) -> None:
    shards, stage = Store(str(tmp_path / "pack")), Store(str(tmp_path / "train"))
    _, shard_set = packed(shards)
    assert bad_shards(shards, [shard_set], 2, Store(str(tmp_path / "whole")), "train-a") == []
    whole = Path(shards.path("shards/1.tar")).read_bytes()
    damage(shards, "shards/1.tar")
    shards.delete("shards/3.tar")
    with pytest.raises(UserError, match=r"^train-a: 2 shards .*max_bad_shards 1 .*1\.tar: sha256 is .*3\.tar: missing"):
        bad_shards(shards, [shard_set], 1, stage, "train-a")
    assert not stage.exists(RECORD)
    found = bad_shards(shards, [shard_set], 2, stage, "train-a")
    assert [shard["name"] for shard in found] == ["shards/1.tar", "shards/3.tar"]
    Path(shards.path("shards/1.tar")).write_bytes(whole)
    damage(shards, "shards/0.tar")
    assert bad_shards(shards, [shard_set], 2, stage, "train-a") == found, "a run carried on skips what it skipped"
