"""How many workers a train stage gets: as many as there is room for.

The global batch and the order of its sequences are the same with any number: fewer workers accumulate more
micro-batches, and where those do not divide evenly, the last ones of some workers are padding.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterator
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import PlacementGroupID
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pipelines.cluster.nodes import ask_nodes
from pipelines.cluster.placement import PlacementWait, room_for
from pipelines.recipe import Train, TrainStage
from tokenization.loader.loader import accumulation

_LOOK = 1.0  # seconds between two looks at the cluster
_ANSWER = 10.0  # seconds that a node has to start a task


def group_sizes(train: Train, stage: TrainStage) -> list[int]:
    """The numbers of workers within the recipe's range that form a mesh and whole groups, the fastest first."""
    least, group = train.min_workers or train.workers, train.for_stage(stage).zero_group or 1
    sizes = [size for size in range(train.workers, least - 1, -1) if size % math.lcm(stage.sp, group) == 0]
    return sorted(sizes, key=lambda size: rounds(stage, size))


def rounds(stage: TrainStage, workers: int) -> int:
    """Micro-batches of a batch that each of so many workers makes one after another; a step's time grows with them."""
    return accumulation(stage.sequences, workers // stage.sp, stage.rows)


def fastest_with_room(train: Train, stage: TrainStage, nodes: Collection[str] | None = None) -> int | None:
    """The fastest size for which these nodes (None: all that live) have room, in what is free and what this driver's
    own group holds, which ends before another starts. None where there is no room for the least.
    """
    usable = available_resources_per_node()
    for group in _own_placement_groups().values():
        for bundle, node in group["bundles_to_node_id"].items():
            for name, amount in group["bundles"][bundle].items():
                if node in usable:
                    usable[node][name] = usable[node].get(name, 0.0) + amount
    room = room_for(train.resources, [free for node, free in usable.items() if nodes is None or node in nodes])
    return next((size for size in group_sizes(train, stage) if size <= room), None)


def _own_placement_groups() -> dict[str, dict[str, Any]]:
    """Ray's tables of this driver's placement groups that are not removed, by id, which ends with that of its job."""
    job = ray.get_runtime_context().get_job_id()
    return {
        number: table
        for number, table in placement_group_table().items()
        if number.endswith(job) and table["state"] != "REMOVED"
    }


def remove_own_placement_groups() -> None:
    """Remove what a dead controller still holds of the cluster, and with it the workers that it no longer watches.

    A driver has no other placement groups while it trains.
    """
    for number in _own_placement_groups():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


def wait_for_room(train: Train, stage: TrainStage) -> int:
    """The size of the next group: of a range, the fastest for which there is room on nodes that answer.

    Waits for it as long as there are nodes enough, however busy. Raises UserError as `PlacementWait` does.
    """
    wait = PlacementWait(f"train-{stage.name}", train.resources, min(group_sizes(train, stage)))
    if train.min_workers is None:
        _wait_for_all(train, wait)
        return train.workers
    before = None
    while True:
        nodes = {node["NodeID"] for node, _ in ask_nodes(_answer, _ANSWER)}
        size = fastest_with_room(train, stage, nodes)
        # Twice the same: what a group that has just ended held is not free at once.
        if size is not None and size == before:
            return size
        if size is None:
            _check(wait)
        before = size
        time.sleep(_LOOK)


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Shows that its node runs tasks."""


def _wait_for_all(train: Train, wait: PlacementWait) -> None:
    """Wait until a placement group of all workers, which an autoscaler sees too, is ready; theirs takes its place."""
    if not train.resources.bundle:
        return
    group = placement_group([train.resources.bundle] * train.workers)
    try:
        while not group.wait(_LOOK):
            _check(wait)
    finally:
        remove_placement_group(group)


def _check(wait: PlacementWait) -> None:
    wait.check()
    wait.remind("the nodes for the workers are in use by others; waiting until they are free")


@contextlib.contextmanager
def autoscaler_asked(train: Train) -> Iterator[None]:
    """Ask an autoscaler, if there is one, for room for all workers of a range: it brings back nodes that were lost."""
    if train.min_workers is None:
        yield
        return
    request_resources(bundles=[train.resources.bundle] * train.workers)
    try:
        yield
    finally:
        request_resources(bundles=[])
