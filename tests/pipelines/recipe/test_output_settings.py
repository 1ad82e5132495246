"""A stage is known by those of its settings that its output depends on, and by no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe.base import Config
from pipelines.recipe.load import load_recipe
from pipelines.recipe.output_settings import output_settings
from storage.settings import OutputNeutral

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


def test_what_is_marked_neutral_is_left_out_at_every_depth() -> None:
    assert output_settings(Outer()) == {
        "name": "a",
        "inner": {"size": 1},
        "pairs": [{"both": {"size": 1}}, {"both": {"size": 3}}],
    }
    assert output_settings(None) is None


HOW_TRAINING_RUNS = {
    *("workers", "min_workers", "resources", "zero", "loss_chunk", "memory", "hardware", "attention", "stages"),
    *("checkpoint_steps", "keep_checkpoints", "max_restarts", "hang_seconds", "max_bad_shards", "shard_cache_gib"),
    *("kernels", "deterministic", "tensorboard", "wandb"),
}
"""The gradient is the same on any mesh, at any ZeRO stage, by any saving of memory and by any kernels, and a checkpoint
fits them all: a run goes on when they change, and no stage is trained again."""
HOW_A_STAGE_RUNS = {"export", "sp", "rows", "attention", "zero", "memory", "tokens"}
"""`tokens` is another way to say `steps`."""
HOW_TOKENIZE_RUNS = {"decode", "encode", "max_bad_fraction", "piece_seconds", "in_flight_mib"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_makes_depends_on_these_keys_alone(path: Path) -> None:
    """A new key has to be thought about: left out, one that shapes the output would pass old output for new."""
    recipe = load_recipe(path)

    def without(branch: Config, keys: set[str]) -> dict[str, Any]:
        assert keys <= set(type(branch).model_fields)
        return branch.model_dump(mode="json", exclude=keys)

    assert output_settings(recipe.tokenize) == without(recipe.tokenize, HOW_TOKENIZE_RUNS)
    assert output_settings(recipe.pack) == without(recipe.pack, {"pool"})
    assert output_settings(recipe.evaluate) == without(recipe.evaluate, {"resources"})
    assert output_settings(recipe.train) == without(recipe.train, HOW_TRAINING_RUNS)
    for stage in recipe.train.stages:
        assert output_settings(stage) == without(stage, HOW_A_STAGE_RUNS)
    if recipe.vqgan and recipe.vqgan.train:
        assert output_settings(recipe.vqgan.train) == without(recipe.vqgan.train, {"checkpoint_steps"})
