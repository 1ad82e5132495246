"""Training in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from model.training.mesh import build_mesh
from pipelines.train.job import TrainJob
from pipelines.train.run_groups import Interruption
from pipelines.train.train_loop import train_worker


@pytest.fixture
def in_this_process(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train stages train in the test's own process, the only worker, in place of groups of workers."""

    def train_here(job: TrainJob, watch: Any) -> list[Interruption]:
        ray.get(watch.begin.remote(1))
        build_mesh()  # which starts a process group of one
        train_worker({"job": job, "watch": watch, "attempt": 1})
        return []

    monkeypatch.setattr("pipelines.train.run.train_in_groups", train_here)
    yield
    torch.use_deterministic_algorithms(False)  # a recipe may have asked for them
