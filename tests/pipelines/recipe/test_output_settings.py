"""A stage is known by those of its settings that its output depends on, and by no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pipelines.recipe import Train, TrainStage
from pipelines.recipe.base import Config, field_types, output_settings
from pipelines.recipe.load import load_recipe
from storage.setting_types import NeutralUntilSet, OutputNeutral

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    size: int = 1
    threads: OutputNeutral[int] = 2


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()
    pairs: tuple[dict[str, Inner], ...] = ({"both": Inner()}, {"both": Inner(3)})
    pool: OutputNeutral[Inner | None] = None
    later: NeutralUntilSet[Inner] = None


def test_what_is_marked_neutral_is_left_out_at_every_depth() -> None:
    assert output_settings(Outer()) == {
        "name": "a",
        "inner": {"size": 1},
        "pairs": [{"both": {"size": 1}}, {"both": {"size": 3}}],
    }
    assert output_settings(Outer(later=Inner(4)))["later"] == {"size": 4}
    assert output_settings(None) is None


WHAT_TRAINING_COMPUTES = {"precision", "betas", "eps", "weight_decay", "decay", "clip_norm", "bad_steps"}
HOW_TRAINING_RUNS = {
    *("workers", "min_workers", "resources", "zero", "zero_group", "loss_chunk", "memory", "hardware", "attention"),
    *("checkpoint_steps", "keep_checkpoints", "max_restarts", "hang_seconds", "max_bad_shards", "shard_cache_gib"),
    *("stages", "kernels", "deterministic", "tensorboard", "wandb", "grace_seconds", "heldout"),
}
"""The gradient is the same on any mesh, at any ZeRO stage, by any saving of memory and by any kernels, and a checkpoint
fits them all: a run goes on when they change, and no stage is trained again."""
WHAT_A_STAGE_COMPUTES = {
    *("name", "context", "rope_theta", "steps", "batch_tokens", "mixture", "objective", "lr", "final_lr"),
    *("warmup_steps", "min_document_tokens", "max_document_tokens"),
}
HOW_A_STAGE_RUNS = {"export", "sp", "rows", "attention", "zero", "zero_group", "memory", "tokens"}
"""`tokens` is another way to say `steps`."""
HOW_TOKENIZE_RUNS = {"decode", "encode", "max_bad_fraction", "piece_seconds", "in_flight_mib"}
HOW_EVALUATION_RUNS = {"resources", "sp", "device_memory", "cell_seconds"}
NEUTRAL_UNTIL_SET_OF_TOKENIZE = {"frame_step"}
NEUTRAL_UNTIL_SET_OF_VQGAN = {"perceptual", "adversarial"}
NEUTRAL_UNTIL_SET_OF_EVALUATION = {"text", "multi_needle", "ruler", "perplexity", "choice", "qa", "video_needle"}


def test_every_key_of_training_is_known_to_shape_the_model_or_not_to() -> None:
    """A new key has to be thought about: left out, one that shapes the model would pass an old model for a new one."""
    train = load_recipe(RECIPES[0]).train
    assert set(field_types(Train)) == WHAT_TRAINING_COMPUTES | HOW_TRAINING_RUNS
    assert set(output_settings(train)) == WHAT_TRAINING_COMPUTES
    assert set(field_types(TrainStage)) == WHAT_A_STAGE_COMPUTES | HOW_A_STAGE_RUNS
    assert set(output_settings(train.stages[0])) == WHAT_A_STAGE_COMPUTES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_makes_depends_on_these_keys_alone(path: Path) -> None:
    recipe = load_recipe(path)

    def without(branch: Any, keys: set[str]) -> dict[str, Any]:
        assert keys <= set(field_types(type(branch)))
        return TypeAdapter(type(branch)).dump_python(branch, mode="json", exclude=keys)

    unset = {key for key in NEUTRAL_UNTIL_SET_OF_TOKENIZE if getattr(recipe.tokenize, key) is None}
    assert output_settings(recipe.tokenize) == without(recipe.tokenize, HOW_TOKENIZE_RUNS | unset)
    assert output_settings(recipe.pack) == without(recipe.pack, {"pool", "stages"})
    unset = {key for key in NEUTRAL_UNTIL_SET_OF_EVALUATION if getattr(recipe.evaluate, key) is None}
    expected = without(recipe.evaluate, HOW_EVALUATION_RUNS | unset)
    if recipe.evaluate.generation and recipe.evaluate.generation.windows is None:
        del expected["generation"]["windows"]
    assert output_settings(recipe.evaluate) == expected
    if recipe.train:
        assert output_settings(recipe.train) == without(recipe.train, HOW_TRAINING_RUNS)
    for stage in recipe.curriculum:
        assert output_settings(stage) == without(stage, HOW_A_STAGE_RUNS)
    if recipe.vqgan and recipe.vqgan.train:
        train = recipe.vqgan.train
        unset = {key for key in NEUTRAL_UNTIL_SET_OF_VQGAN if getattr(train, key) is None}
        assert output_settings(train) == without(train, {"checkpoint_steps"} | unset)
