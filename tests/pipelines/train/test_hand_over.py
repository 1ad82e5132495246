"""A stage of the curriculum starts where the one before ended: from its fp32 weights, or else from what it exported."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.cluster.progress import bar
from pipelines.recipe import Recipe
from pipelines.train.job import TrainJob
from pipelines.train.run import train_stage
from storage.errors import UserError
from storage.store import Store
from testing.packed_shards import CONTEXT, packed
from testing.tiny_run import VOCABULARY
from tests.pipelines.train.test_bad_shards import recipe_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_this_process")]

FIRST, SECOND = 4, 1  # steps
NO_CHANGE = 1e-30  # a learning rate at which no weight moves


def curriculum(folder: Path) -> Recipe:
    """Two stages in bf16, of which the second leaves the weights as they are."""
    tree = recipe_of(folder, 0).model_dump(mode="json")
    stage = {**tree["train"]["stages"][0], "batch_tokens": CONTEXT}
    stages = [{**stage, "steps": FIRST, "lr": 1e-2}, {**stage, "name": "more", "steps": SECOND, "lr": NO_CHANGE}]
    tree["train"] |= {"workers": 1, "precision": "bf16", "stages": stages}
    return Recipe.model_validate(tree)


def trained(recipe: Recipe, number: int, before: Store | None, store: Store) -> dict[str, torch.Tensor]:
    """The fp32 weights in the stage's last checkpoint."""
    shards, stage = Store(str(Path(store.url).parent / "pack")), recipe.train.stages[number]
    record, _ = packed(shards)
    with bar(stage.name, stage.steps, "step") as line:
        train_stage(TrainJob(recipe, stage, VOCABULARY, shards, record, before, store), line)
    return masters(Path(store.url) / "checkpoints" / f"step-{stage.steps:08d}")


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "rank-00000-0000.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weight/")}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.fixture
def first(tmp_path: Path) -> tuple[Recipe, Store]:
    """The recipe and its finished first stage."""
    recipe, store = curriculum(tmp_path), Store(str(tmp_path / "first"))
    trained(recipe, 0, None, store)
    return recipe, store


def test_the_next_stage_has_the_fp32_weights_and_without_their_checkpoint_those_of_the_export(
    first: tuple[Recipe, Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, before = first
    ended = masters(tmp_path / "first" / "checkpoints" / f"step-{FIRST:08d}")
    rounded = {name: weight.bfloat16().float() for name, weight in ended.items()}
    assert not same(ended, rounded)

    assert same(trained(recipe, 1, before, Store(str(tmp_path / "second"))), ended)
    shutil.rmtree(tmp_path / "first" / "checkpoints" / f"step-{FIRST:08d}")
    with caplog.at_level(logging.WARNING, "ringworld"):
        assert same(trained(recipe, 1, before, Store(str(tmp_path / "third"))), rounded)
    assert "train-more: the last checkpoint of the stage before is gone" in caplog.text


def test_a_damaged_checkpoint_to_start_from_is_told_in_a_sentence(first: tuple[Recipe, Store], tmp_path: Path) -> None:
    recipe, before = first
    file = tmp_path / "first" / "checkpoints" / f"step-{FIRST:08d}" / "rank-00000-0000.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    weight = next(entry for name, entry in header.items() if name.startswith("weight/"))  # moments are not read here
    content[8 + length + weight["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    said = (
        r"step-00000004, to start from, is damaged: rank-00000-0000\.safetensors .*; restore it, or delete this folder"
    )
    with pytest.raises(UserError, match=said):
        trained(recipe, 1, before, Store(str(tmp_path / "second")))
