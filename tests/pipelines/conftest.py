"""A Ray instance in the test's own process, and a real S3 server: neither is started unless a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from jobs.bench.object_store import ObjectStore
from jobs.bench.object_store import object_store as running_store


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, for calling a pipeline's functions in this process."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with a bucket `data`."""
    with running_store("data") as store:
        yield store
