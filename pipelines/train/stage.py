"""The train stage: one stage of the curriculum on Ray Train workers.

In: packed shards and the weights of the stage before. Out: `model/` (a plain Hugging Face Llama), `checkpoints/`, and
`metrics/`, one JSON line a step. A checkpoint commits engine, loader position and the metrics up to it together, so
a run that is killed anywhere carries on from the last one with the exact next sequence, and no step is listed twice.
Each worker's loader plans its micro-batches and takes out the worker's share of them ahead of the steps. Shards that
are not what was written end the stage, or, as many as `train.max_bad_shards`, are skipped and what is lost is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from pipelines.cluster.heartbeat import start_watch
from pipelines.cluster.progress import Bar, following
from pipelines.cluster.ray_cluster import own_errors
from pipelines.recipe import Recipe, TrainStage
from pipelines.train.bad_shards import bad_shards
from pipelines.train.data import shard_sets
from pipelines.train.job import MODEL, TrainJob
from pipelines.train.metrics.steps import bad_step_figures, read_metrics, tokens_per_second, total_lost
from pipelines.train.profiled_steps import ProfiledSteps
from pipelines.train.run_groups import train_in_groups
from storage.errors import BadData, UserError
from storage.store import Store
from tokenization.vocabulary import JointVocabulary

log = logging.getLogger("ringworld")


def train_stage(
    recipe: Recipe,
    stage: TrainStage,
    vocabulary: JointVocabulary,
    packed: tuple[Store, dict[str, Any]],
    before: Store | None,
    store: Store,
    line: Bar,
    profile: ProfiledSteps | None = None,
) -> dict[str, Any]:
    """Run the stage on the cluster and return its part of the manifest."""
    label = f"train-{stage.name}"
    job = TrainJob(recipe, stage, vocabulary, *packed, before, store, profile=profile)
    with own_errors():
        bad = bad_shards(job.shards, list(shard_sets(job).values()), recipe.train.max_bad_shards, store, label)
    job = dataclasses.replace(job, skip=tuple(shard["name"] for shard in bad))
    watch = start_watch()
    with following(line, watch), bad_data_told(label):
        interruptions = train_in_groups(job, watch)
    steps = list(read_metrics(store))
    if stage.export:
        _export(store, Store(stage.export, recipe.storage.options, store.fence))
    return {
        "outputs": {
            "model": MODEL,
            "files": store.hashes(MODEL),
            "context": stage.context,
            "rope_theta": stage.rope_theta,
        },
        "figures": {
            "steps": len(steps),
            "tokens": sum(step["tokens"] for step in steps),
            "tokens_per_second": tokens_per_second(steps),
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            **({"interruptions": [one.to_json() for one in interruptions]} if interruptions else {}),
            **bad_step_figures(steps),
            **({"bad_shards": list(job.skip), **total_lost(steps)} if job.skip else {}),
        },
    }


@contextlib.contextmanager
def bad_data_told(label: str) -> Iterator[None]:
    """A shard that is not what was written is the user's to mend, or to put up with."""
    try:
        yield
    except BadData as error:
        raise UserError(
            f"{label}: {error}; to go on without such shards, set train.max_bad_shards and run again"
        ) from error


def _export(store: Store, target: Store) -> None:
    for name in store.names(MODEL):
        with store.open(name) as source, target.writing(name.removeprefix(f"{MODEL}/")) as file:
            while piece := source.read(2**24):
                file.write(piece)
