"""Partitions that make nothing, as Ray tasks: their records are such as those of the tokenize stage."""

from __future__ import annotations

from collections.abc import Callable

import ray

from pipelines.dag.records import Record
from pipelines.tokenize.tokenize_task import DOCUMENTS, MADE


def record_of(name: str) -> Record:
    """The record of a partition of thirty clips."""
    counts = {"units": 30, "frames": 300, "thinned_videos": 0, "frames_left_out": 0, "documents": 30}
    counts |= {"tokens": 80_000, "vision_tokens": 77_000}
    where = {"partition": name, "source": "clips", "heldout": False, "file": f"{DOCUMENTS}/{name}.parquet"}
    return {**where, **counts, "quarantine": [], "inner_heldout": {}, "sha256": 2 * f"{name[-16:]:0>32}"}


@ray.remote
def _make(name: str) -> Record:
    return {**record_of(name), MADE: 300}


def submitted() -> Callable[[str], ray.ObjectRef]:
    """What starts the task of a partition."""
    return _make.options(name="tokenize", max_retries=0, num_cpus=1).remote
