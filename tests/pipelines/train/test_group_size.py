"""pipelines/train/group_size.py: how many workers a stage gets."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.cluster import placement
from pipelines.cluster.placement import room_for
from pipelines.recipe import Resources, Train, TrainStage
from pipelines.train.group_size import fastest_with_room, group_sizes, wait_for_room
from storage.errors import UserError


def train_of(workers: int, min_workers: int | None, **stage: Any) -> tuple[Train, TrainStage]:
    common = {"name": "text", "context": 64, "rope_theta": 1e4, "steps": 4, "mixture": {"books": 1}, "lr": 1e-3}
    tree = {"batch_tokens": 64 * 12, "objective": "text", **common, **stage}
    train = Train(workers=workers, min_workers=min_workers, stages=[TrainStage.model_validate(tree)])
    return train, train.stages[0]


@pytest.mark.parametrize(
    ("workers", "min_workers", "stage", "sizes"),
    [
        (4, None, {}, [4]),
        (4, 1, {}, [4, 3, 2, 1]),
        (6, 2, {}, [6, 5, 4, 3, 2]),
        (8, 2, {"sp": 2}, [8, 6, 4, 2]),
        (8, 2, {"sp": 4}, [8, 4]),
        (6, 1, {"rows": 2}, [6, 5, 4, 3, 2, 1]),
        (14, 9, {}, [14, 13, 12, 11, 10, 9]),
        (9, 6, {"sp": 2}, [8, 6]),
        (12, 2, {"sp": 2, "zero": 3, "zero_group": 3}, [12, 6]),
        (8, 1, {"zero": 3, "zero_group": 4}, [8, 4]),
    ],
)
def test_sizes_form_a_mesh_the_fastest_first(workers: int, min_workers: int | None, stage: Any, sizes: Any) -> None:
    assert group_sizes(*train_of(workers, min_workers, **stage)) == sizes


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 5.0, "GPU": 2.0, "trainer": 9.0}, {"CPU": 3.0, "GPU": 4.0, "trainer": 9.0}, {"CPU": 64.0}]
    assert room_for(Resources(cpus=2, gpus=1, custom={"trainer": 1}), nodes) == 3
    assert room_for(Resources(cpus=2), nodes) == 2 + 1 + 32
    assert room_for(Resources(cpus=0, gpus=0.5), nodes) == 4 + 8


def test_tokens_are_whole_batches() -> None:
    train, stage = train_of(1, None, steps=None, tokens=64 * 12 * 3 + 1)
    assert stage.steps == 4
    with pytest.raises(ValueError, match=r"tokens 768 are 1 steps of batch_tokens 768, not 4; give one"):
        train_of(1, None, tokens=768)
    with pytest.raises(ValueError, match="min_workers 3 is more than workers 2"):
        train_of(2, 3)
    assert train.hang_seconds == 1800


HOLDER = """
import sys, ray
from ray.util.placement_group import placement_group
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
ray.get(placement_group([{"CPU": 1}]).ready())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_job(local_ray: None) -> Iterator[subprocess.Popen[str]]:
    """Another driver on the same Ray of two CPUs, whose placement group holds one of them until its stdin closes."""
    command = [sys.executable, "-c", HOLDER, ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert any("held" in line for line in iter(holder.stdout.readline, ""))
        yield holder
        holder.kill()


def eventually(fact: Callable[[], bool]) -> bool:
    """Whether it comes true: Ray's tables follow what happens after a moment."""
    deadline = time.monotonic() + 60
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.1)
    return fact()


@pytest.mark.slow
def test_what_another_job_holds_is_no_room_and_what_the_own_group_holds_is(other_job: subprocess.Popen[str]) -> None:
    train, stage = train_of(2, 1)
    assert eventually(lambda: fastest_with_room(train, stage) == 1)
    assert wait_for_room(train, stage) == 1
    group = placement_group([train.resources.bundle])
    try:
        ray.get(group.ready())
        assert eventually(lambda: ray.available_resources().get("CPU", 0) == 0), "the group and the other job hold all"
        assert fastest_with_room(train, stage) == 1, "the group itself fits, and no larger one"
        other_job.kill()
        assert eventually(lambda: fastest_with_room(train, stage) == 2)
    finally:
        remove_placement_group(group)
    assert wait_for_room(train, stage) == 2


@pytest.mark.slow
def test_a_fixed_number_waits_while_another_job_holds_its_places(
    other_job: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    train, stage = train_of(2, None)
    timer = threading.Timer(3, other_job.kill)
    timer.start()
    assert wait_for_room(train, stage) == 2
    assert not timer.is_alive(), "not before the other job was gone"
    assert "train-text: the nodes for the workers are in use by others; waiting until they are free" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("min_workers", [None, 3])
def test_workers_for_which_there_are_no_nodes_are_waited_for_with_an_end(
    local_ray: None, min_workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "WAIT_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"^train-text: the cluster has had no nodes for 3 x {'CPU': 1.0} for 1 s, and"):
        wait_for_room(*train_of(3, min_workers))
