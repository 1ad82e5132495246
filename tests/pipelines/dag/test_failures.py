"""pipelines/dag/partitions.py: how often a partition is tried, and what is said when it is tried no more."""

from __future__ import annotations

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from pipelines.dag.partitions import CRASHES, LOSSES, Failures
from storage.errors import UserError


def test_a_partition_that_kills_its_worker_again_and_again_ends_the_stage_with_what_happened_each_time() -> None:
    failures = Failures("tokenize")
    failures.add("partition clips-0", NodeDiedError(""))
    failures.add("partition clips-0", OutOfMemoryError(""))
    for _ in range(CRASHES - 2):
        failures.add("partition clips-0", WorkerCrashedError())
    with pytest.raises(UserError) as raised:
        failures.add("partition clips-0", OutOfMemoryError(""))
    assert str(raised.value).startswith(
        "tokenize: partition clips-0 failed 6 times: its node was lost 1 time, "
        "its worker was killed for lack of memory 2 times, its worker died 3 times; "
    )


def test_many_partitions_may_each_lose_a_worker() -> None:
    failures = Failures("tokenize")
    for number in range(1000):
        failures.add(f"partition clips-{number}", WorkerCrashedError())


def test_lost_nodes_are_borne_longer_and_not_for_ever() -> None:
    failures = Failures("pack-text")
    for _ in range(LOSSES - 1):
        failures.add("partition acts-0", NodeDiedError(""))
    with pytest.raises(UserError, match=rf"acts-0 failed {LOSSES} times: its node was lost {LOSSES} times"):
        failures.add("partition acts-0", NodeDiedError(""))
