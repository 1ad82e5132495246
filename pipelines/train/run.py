"""Trains one stage of the curriculum on Ray Train workers.

In: packed shards and the weights of the stage before. Out: `model/` (a plain Hugging Face Llama), `checkpoints/`, and
`metrics/`, one JSON line a step. A checkpoint commits engine, loader position and the metrics up to it together, so
a run that is killed anywhere goes on from the last one with the exact next sequence, and no step is listed twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from pipelines.cluster.heartbeat import start_watch
from pipelines.cluster.progress import Bar, following
from pipelines.cluster.ray_cluster import own_errors
from pipelines.train.bad_shards import bad_shards
from pipelines.train.best_checkpoint import best_checkpoint
from pipelines.train.data import shard_sets
from pipelines.train.job import CHECKPOINTS, MODEL, TrainJob
from pipelines.train.metrics.steps import read_metrics, tokens_per_second
from pipelines.train.record import TrainFigures, TrainOutputs, TrainRecord
from pipelines.train.run_groups import train_in_groups
from storage.errors import BadData, UserError


def train_stage(job: TrainJob, line: Bar) -> TrainRecord:
    """Train to the stage's last step and leave its model."""
    recipe, stage, store, label = job.recipe, job.stage, job.store, f"train-{job.stage.name}"
    with own_errors():
        bad = bad_shards(job.shards, list(shard_sets(job).values()), recipe.training.max_bad_shards, store, label)
    job = dataclasses.replace(job, skip=tuple(shard["name"] for shard in bad))
    watch = start_watch()
    with following(line, watch), bad_data_as_user_error(label):
        interruptions = train_in_groups(job, watch)
    steps = list(read_metrics(store))
    shown = ("reason", "step", "workers", "seconds")
    losses = ("lost_sequences", "lost_tokens") if job.skip else ()
    figures = TrainFigures(
        steps=len(steps),
        tokens=sum(step["tokens"] for step in steps),
        tokens_per_second=tokens_per_second(steps),
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
        interruptions=tuple({name: getattr(each, name) for name in shown} for each in interruptions) or None,
        dropped_steps=sum("dropped" in step for step in steps) or None,
        rolled_back=tuple(step["rolled_back"] for step in steps if "rolled_back" in step) or None,
        best=best_checkpoint(store.at(CHECKPOINTS)),
        bad_shards=job.skip or None,
        **{name: sum(step.get(name, 0) for step in steps) for name in losses},
    )
    return TrainRecord(TrainOutputs(MODEL, store.hashes(MODEL), stage.context, stage.rope_theta), figures)


@contextlib.contextmanager
def bad_data_as_user_error(label: str) -> Iterator[None]:
    """The user can mend a shard that is not what was written, or have it skipped."""
    try:
        yield
    except BadData as error:
        remedy = "to go on without such shards, set train.max_bad_shards and run again"
        raise UserError(f"{label}: {error}; {remedy}") from error
