"""A driver that trains stages one after another on a cluster, for tests that disturb it: `training_driver.py FOLDER`.

Each line read is a JSON object: the name of the run, how many trainers the nodes must have room for before it begins,
and the keys of `train` that it changes. Its stage is trained over the shards in FOLDER, and `FOLDER/<name>.json` holds
its part of the manifest when it is done.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import ray

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.dag.manifest import record_json
from pipelines.recipe import Recipe
from pipelines.train.job import TrainJob
from pipelines.train.run import train_stage
from storage.store import Store
from testing.packed_shards import CONTEXT, packed
from testing.tiny_run import VOCABULARY, tiny_recipe

BATCH, STEPS, CHECKPOINT_STEPS = 14, 72, 4
"""Sequences of a batch, which 2 workers share evenly and 3 or 4 do not."""


def recipe_of(folder: Path, **train: object) -> Recipe:
    """The tiny recipe with one train stage of `STEPS` steps."""
    tree = tiny_recipe(folder).model_dump(mode="json")
    stage = {**tree["train"]["stages"][0], "context": CONTEXT, "steps": STEPS, "batch_tokens": BATCH * CONTEXT}
    tree["train"] |= {"checkpoint_steps": CHECKPOINT_STEPS, "keep_checkpoints": 100, "eps": 1e-5, **train}
    tree["train"] |= {"resources": {"cpus": 1, "custom": {"trainer": 1}}, "stages": [stage]}
    tree["evaluate"] |= {"needle": None, "generation": None}
    return Recipe.model_validate(tree)


def main() -> None:
    """Pack, then train a stage for each line of JSON on stdin: its name, how many trainers to wait for, and what to set
    of `train`. Its manifest is written beside it."""
    logging.basicConfig(level=logging.INFO)
    folder = Path(sys.argv[1])
    shards = Store(str(folder / "pack"))
    record, _ = packed(shards)
    with ray_instance(os.environ["RAY_ADDRESS"], Capacity()):
        for line in sys.stdin:
            asked = json.loads(line)
            name, trainers = asked.pop("name"), asked.pop("trainers")
            while ray.cluster_resources().get("trainer", 0) < trainers:
                time.sleep(0.1)
            recipe = recipe_of(folder, **asked)
            stage, store = recipe.curriculum[0], Store(str(folder / name))
            with bar(name, STEPS, "step") as progress:
                done = train_stage(TrainJob(recipe, stage, VOCABULARY, shards, record, None, store), progress)
            Store(str(folder)).write_json(f"{name}.json", record_json(done))


if __name__ == "__main__":
    main()
