"""TensorBoard's own reading of a folder of events, and what it should find there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.train.metrics.steps import step_figures

Shown = dict[str, list[tuple[int, float]]]


def shown_by_tensorboard(folder: Path) -> Shown:
    """(step, value) in order, by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def shown_of(lines: Iterable[dict[str, Any]]) -> Shown:
    """The same from a stage's `metrics/`, rounded to TensorBoard's fp32."""
    shown: Shown = {}
    for line in lines:
        for tag, value in step_figures(line).items():
            shown.setdefault(tag, []).append((line["step"], float(np.float32(value))))
    return shown
