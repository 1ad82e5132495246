"""Trains one stage of the curriculum on Ray Train workers.

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.cluster.heartbeat import start_watch
from pipelines.cluster.progress import Bar, following
from pipelines.cluster.ray_cluster import own_errors
from pipelines.train.bad_shards import bad_shards
from pipelines.train.data import shard_sets
from pipelines.train.job import MODEL, TrainJob
from pipelines.train.metrics.steps import read_metrics, tokens_per_second
from pipelines.train.record import TrainFigures, TrainOutputs, TrainRecord
from pipelines.train.run_groups import train_in_groups
from storage.errors import BadData, UserError
from storage.store import Store

log = logging.getLogger("ringworld")


def train_stage(job: TrainJob, line: Bar) -> TrainRecord:
    """Train to the stage's last step and leave its model."""
    recipe, stage, store, label = job.recipe, job.stage, job.store, f"train-{job.stage.name}"
    with own_errors():
        bad = bad_shards(job.shards, list(shard_sets(job).values()), recipe.train.max_bad_shards, store, label)
    job = dataclasses.replace(job, skip=tuple(shard["name"] for shard in bad))
    watch = start_watch()
    with following(line, watch), bad_data_told(label):
        interruptions = train_in_groups(job, watch)
    steps = list(read_metrics(store))
    if stage.export:
        _export(store, Store(stage.export, recipe.storage.options, store.fence))
    figures = TrainFigures(
        steps=len(steps),
        tokens=sum(step["tokens"] for step in steps),
        tokens_per_second=tokens_per_second(steps),
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
        interruptions=tuple(one.to_json() for one in interruptions) or None,
        dropped_steps=sum("dropped" in step for step in steps) or None,
        rolled_back=tuple(step["rolled_back"] for step in steps if "rolled_back" in step) or None,
        bad_shards=job.skip or None,
        lost_sequences=_sum(steps, "lost_sequences") if job.skip else None,
        lost_tokens=_sum(steps, "lost_tokens") if job.skip else None,
    )
    return TrainRecord(TrainOutputs(MODEL, store.hashes(MODEL), stage.context, stage.rope_theta), figures)


@contextlib.contextmanager
def bad_data_told(label: str) -> Iterator[None]:
    """A shard that is not what was written is the user's to mend, or to put up with."""
    try:
        yield
    except BadData as error:
        raise UserError(
            f"{label}: {error}; to go on without such shards, set train.max_bad_shards and run again"
        ) from error


def _sum(steps: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(step.get(name, 0) for step in steps)


def _export(store: Store, target: Store) -> None:
    for name in store.names(MODEL):
        with store.open(name) as source, target.writing(name.removeprefix(f"{MODEL}/")) as file:
            while piece := source.read(2**24):
                file.write(piece)
