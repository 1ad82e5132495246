"""The sinks that keep a stage's steps in its folder: JSON lines in `metrics/`, TensorBoard's events in `tensorboard/`.

Both write one file for the steps between two checkpoints, named by the last of them, just before the checkpoint is
committed. So both work on an object store, a step that is done again after a kill is written under the same name again,
and no step is ever listed twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from pipelines.train.job import METRICS, TENSORBOARD
from pipelines.train.metrics.sink import Held
from pipelines.train.metrics.steps import write_metrics
from storage.store import Store


class MetricsFile(Held):
    """JSON lines, read by `read_metrics`."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Keep the line for the next checkpoint."""
        self._pending.append(dict(line))

    def _publish(self, taken: list[Any], checkpoint_seconds: float) -> None:
        write_metrics(self._store, [*taken[:-1], {**taken[-1], "checkpoint_seconds": checkpoint_seconds}])

    def close(self) -> None:
        """What is not committed is not kept."""


class TensorBoard(Held):
    """TensorBoard's event files, one scalar a figure; `tensorboard --logdir RUN/stages` shows all stages."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Keep the step's event for the next checkpoint."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._pending.append(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))

    def _publish(self, taken: list[Any], checkpoint_seconds: float) -> None:
        """Into a file that TensorBoard reads after those before it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        first, last = Event(wall_time=taken[0].wall_time, file_version="brain.Event:2"), Event()
        last.CopyFrom(taken[-1])
        last.summary.value.add(tag="checkpoint_seconds", simple_value=checkpoint_seconds)
        with self._store.writing(f"{TENSORBOARD}/events.out.tfevents.{last.step + 1:08d}") as file:
            writer = RecordWriter(file)
            for event in (first, *taken[:-1], last):
                writer.write(event.SerializeToString())

    def close(self) -> None:
        """What is not committed is not kept."""


def remove_uncommitted(store: Store, step: int) -> None:
    """Remove what a killed run wrote of steps beyond `step`, the checkpoint that the stage carries on from.

    Without it, a changed `checkpoint_steps` would list those steps twice.
    """
    for folder in (METRICS, TENSORBOARD):
        for name in store.names(folder):
            written = re.search(r"(\d{8})(\.jsonl)?$", name)
            if written and int(written[1]) > step:
                store.delete(name)
