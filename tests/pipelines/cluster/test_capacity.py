"""A Ray instance of our own offers what the recipe needs at once, and no less."""

from __future__ import annotations

from pathlib import Path

from pipelines.build import build_stages
from pipelines.cluster.capacity import Capacity, needed_at_once
from pipelines.recipe import Recipe
from pipelines.recipe.load import load_recipe
from pipelines.sources.listing import SourceObject

RECIPES = Path(__file__).parents[3] / "recipes"


def needed(recipe: Recipe) -> Capacity:
    """By all stages of a recipe whose sources have a text and a video."""
    objects = [SourceObject(kind, "a", f"{kind}.file", 1, "", kind, False, {}) for kind in ("text", "video")]
    return needed_at_once(stage.resources() for stage in build_stages(recipe, objects))


def test_a_training_group_needs_all_its_workers_at_once_and_a_pool_its_first() -> None:
    need = needed(load_recipe(RECIPES / "lwm-vision-7b.yaml", ["train.min_workers=null"]))
    assert need.gpus == 128
    assert need.cpus == 128 * 8
    assert need.custom == {"decode": 1, "encode": 1, "trainer": 128}


def test_of_a_range_of_workers_the_least_need_their_gpus_and_there_is_room_for_all() -> None:
    need = needed(load_recipe(RECIPES / "lwm-vision-7b.yaml", ["train.min_workers=64"]))
    assert need.gpus == 64, "a machine with fewer than the most trains on what it has"
    assert (need.cpus, need.custom["trainer"]) == (128 * 8, 128), "CPUs and names are but numbers, and cap the group"


def test_tasks_wait_for_room_so_one_of_them_is_enough() -> None:
    need = needed(load_recipe(RECIPES / "quickstart.yaml", ["tokenize.decode.workers=50"]))
    assert (need.cpus, need.gpus, need.custom) == (2, 0, {})
