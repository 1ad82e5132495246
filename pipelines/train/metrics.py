"""The steps of a stage: one JSON line each, committed with the next checkpoint, and the figures shown of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from model.checkpoint import Lost, Written
from model.engine import StepMetrics
from pipelines.storage import Store
from pipelines.train.job import METRICS
from tokenization.loader import Batch


def read_metrics(store: Store) -> Iterator[dict[str, Any]]:
    """The committed steps of a train stage, in order."""
    for name in store.names(METRICS):
        with store.open(name) as file:
            yield from (json.loads(line) for line in file)


def write_metrics(store: Store, steps: list[dict[str, Any]]) -> None:
    """Commit the steps since the last checkpoint; a repeat after a kill writes the same name again."""
    with store.writing(f"{METRICS}/{steps[-1]['step'] + 1:08d}.jsonl") as file:
        for step in steps:
            file.write((json.dumps(step) + "\n").encode())


def drop_metrics_after(store: Store, step: int) -> None:
    """Remove steps from this one on: they were to be committed with a checkpoint that is not there, or not whole."""
    for name in store.names(METRICS):
        if int(PurePosixPath(name).stem) > step:
            store.delete(name)


def checkpoint_figures(cost: Lost, written: Written | None) -> dict[str, float]:
    """What a save cost the steps, and what the last one did in the background, for Ray's metrics."""
    figures = {"checkpoint_stall_seconds": cost.seconds, "checkpoint_snapshot_bytes": float(cost.n_bytes)}
    if written is not None:
        figures |= {"checkpoint_write_seconds": written.seconds, "checkpoint_bytes": float(written.n_bytes)}
    return figures


def step_record(metrics: StepMetrics) -> dict[str, Any]:
    """A step's line; of a step that was dropped the gradient's norm is null."""
    record = dataclasses.asdict(metrics)
    return record if math.isfinite(metrics.grad_norm) else {**record, "grad_norm": None}


def step_figures(metrics: StepMetrics) -> dict[str, float]:
    """What is shown of a step beside its bar and in Ray's metrics."""
    figures = {
        "loss": metrics.loss,
        "lr": metrics.lr,
        "grad_norm": metrics.grad_norm,
        "tokens_per_second": metrics.tokens / max(metrics.seconds, 1e-9),
    }
    if metrics.text_targets:
        figures["text_nats_per_token"] = metrics.text_nats / metrics.text_targets
    if metrics.vision_targets:
        figures["vision_nats_per_token"] = metrics.vision_nats / metrics.vision_targets
    return figures


def lost_to_bad_shards(batch: Batch, context: int) -> dict[str, int]:
    """Of a step, over all ranks; nothing where nothing is lost."""
    return {"lost_sequences": len(batch.lost), "lost_tokens": len(batch.lost) * context} if batch.lost else {}


def bad_step_figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """How many steps were dropped, and which ones a stage went back from; nothing where there were none."""
    dropped = sum("dropped" in step for step in steps)
    rolled_back = [step["rolled_back"] for step in steps if "rolled_back" in step]
    return {**({"dropped_steps": dropped} if dropped else {}), **({"rolled_back": rolled_back} if rolled_back else {})}


def total_lost(steps: list[dict[str, Any]]) -> dict[str, int]:
    """The sum of `lost_to_bad_shards` over steps."""
    return {name: sum(step.get(name, 0) for step in steps) for name in ("lost_sequences", "lost_tokens")}
