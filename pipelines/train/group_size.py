"""How many workers a train stage gets: as many as there is room for.

The global batch and the order of its sequences are the same with any number: fewer workers accumulate more
micro-batches, and where those do not go round, the last ones of some workers are padding.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.placement import PlacementWait, room_for
from pipelines.recipe import Train, TrainStage
from tokenization.loader.loader import accumulation

_LOOK = 1.0  # seconds between two looks at the cluster
_ANSWER = 10.0  # seconds that a node has to start a task


def group_sizes(train: Train, stage: TrainStage) -> list[int]:
    """The numbers of workers within the recipe's range that form a mesh, the fastest first."""
    least = train.workers if train.min_workers is None else train.min_workers
    sizes = [size for size in range(train.workers, least - 1, -1) if size % stage.sp == 0]
    return sorted(sizes, key=lambda size: rounds(stage, size))


def rounds(stage: TrainStage, workers: int) -> int:
    """Micro-batches that each of so many workers makes of a batch, one after another: what a step's time goes by."""
    return accumulation(stage.sequences, workers // stage.sp, stage.rows)


def fastest_with_room(train: Train, stage: TrainStage) -> int | None:
    """The fastest size for which the nodes have room, in what is free and what this run's own group holds; None where
    there is none for the least.
    """
    return _fastest(train, stage, _usable_resources().values())


def _fastest(train: Train, stage: TrainStage, nodes: Iterable[Mapping[str, float]]) -> int | None:
    room = room_for(train.resources, nodes)
    return next((size for size in group_sizes(train, stage) if size <= room), None)


def _usable_resources() -> dict[str, dict[str, float]]:
    """By living node: what is free, and what groups of this driver's workers hold, which end before another starts."""
    usable = available_resources_per_node()
    for group in own_placement_groups().values():
        for bundle, node in group["bundles_to_node_id"].items():
            for name, amount in group["bundles"][bundle].items():
                if node in usable:
                    usable[node][name] = usable[node].get(name, 0.0) + amount
    return usable


def own_placement_groups() -> dict[str, dict[str, Any]]:
    """Ray's tables of this driver's placement groups that are not removed, by id, which ends with that of its job."""
    job = ray.get_runtime_context().get_job_id()
    return {
        number: table
        for number, table in placement_group_table().items()
        if number.endswith(job) and table["state"] != "REMOVED"
    }


def _answering_nodes() -> set[str]:
    """The nodes on which a task runs at once: one that has just ended is still listed for up to half a minute."""
    answers = {}
    for node in [node["NodeID"] for node in ray.nodes() if node["Alive"]]:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[_answer.options(scheduling_strategy=there).remote()] = node
    done, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER)
    nodes = set()
    for answer in done:
        with contextlib.suppress(RayError):  # of a node whose end was noticed meanwhile
            ray.get(answer)
            nodes.add(answers[answer])
    return nodes


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Any task at all."""


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
        nodes, usable = _answering_nodes(), _usable_resources()
        size = _fastest(train, stage, [resources for node, resources in usable.items() if node in nodes])
        # Twice the same: what a group that has just ended held is not free at once.
        if size is not None and size == before:
            return size
        if size is None:
            _check(wait)
        before = size
        time.sleep(_LOOK)


def _wait_for_all(train: Train, wait: PlacementWait) -> None:
    """Until a placement group of all workers is ready, which an autoscaler sees too; theirs then takes its place."""
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


def ask_autoscaler(train: Train, workers: int) -> None:
    """Have the cluster's autoscaler, if it has one, keep room for so many workers; 0: no longer."""
    request_resources(bundles=[train.resources.bundle] * workers)
