"""A stage's steps in its folder beside the JSON lines of `metrics/`: TensorBoard's events in `tensorboard/`.

Each folder has one file for the steps between two checkpoints, named by the last of them and written just before the
checkpoint is committed. So both work on an object store, a step that is done again after a kill is written under the
same name again, and no step is ever listed twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.train.job import METRICS, TENSORBOARD
from pipelines.train.metrics.steps import Step
from storage.store import Store


def write_events(store: Store, steps: Sequence[Step]) -> None:
    """Write steps as one of TensorBoard's event files, one scalar a figure; TensorBoard reads the files by name.

    `tensorboard --logdir RUN/stages` shows all stages.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with store.writing(f"{TENSORBOARD}/events.out.tfevents.{steps[-1].line['step'] + 1:08d}") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=steps[0].time, file_version="brain.Event:2").SerializeToString())
        for step in steps:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in step.figures.items()]
            event = Event(wall_time=step.time, step=step.line["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())


def remove_uncommitted(store: Store, step: int) -> None:
    """Remove what a killed run wrote of steps beyond `step`, the checkpoint that the stage goes on from.

    Without it, a changed `checkpoint_steps` would list those steps twice.
    """
    for folder in (METRICS, TENSORBOARD):
        for name in store.names(folder):
            written = re.search(r"(\d{8})(\.jsonl)?$", name)
            if written and int(written[1]) > step:
                store.delete(name)
