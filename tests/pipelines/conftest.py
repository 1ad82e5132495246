"""A Ray instance in the test's own process, and a real S3 server: neither is started unless a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from jobs.bench.object_store import ObjectStore
from jobs.bench.object_store import object_store as running_store
from model.mesh import build_mesh
from pipelines.train.groups import Interruption
from pipelines.train.job import TrainJob
from pipelines.train.worker import train_worker


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, for calling a pipeline's functions in this process."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def in_this_process(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train stages train in the test's own process, the only worker, in place of groups of workers."""

    def train_here(job: TrainJob, watch: Any) -> list[Interruption]:
        ray.get(watch.begin.remote(1))
        build_mesh()  # which starts a process group of one
        train_worker({"job": job, "watch": watch, "attempt": 1})
        return []

    monkeypatch.setattr("pipelines.train.stage.train_in_groups", train_here)
    yield
    torch.use_deterministic_algorithms(False)  # a recipe may have asked for them


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with a bucket `data`."""
    with running_store("data") as store:
        yield store
