"""How many workers a train stage gets: as many as there is room for.

The global batch and the order of its sequences are the same with any number: fewer workers accumulate more
micro-batches, and where those do not go round, the last ones of some workers are padding.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.recipe import Resources, Train, TrainStage
from tokenization.loader.loader import accumulation

log = logging.getLogger("ringworld")

_LOOK = 1.0  # seconds between two looks at the cluster
_REMIND = 60.0
_ANSWER = 10.0  # seconds that a node has to start a task


def group_sizes(train: Train, stage: TrainStage) -> list[int]:
    """The numbers of workers within the recipe's range that form a mesh, the fastest first."""
    least = train.workers if train.min_workers is None else train.min_workers
    sizes = [size for size in range(train.workers, least - 1, -1) if size % stage.sp == 0]
    return sorted(sizes, key=lambda size: rounds(stage, size))


def rounds(stage: TrainStage, workers: int) -> int:
    """Micro-batches that each of so many workers makes of a batch, one after another: what a step's time goes by."""
    return accumulation(stage.sequences, workers // stage.sp, stage.rows)


def room_for(pool: Resources, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers of a pool fit on nodes of these resources."""
    if not pool.bundle:
        return 2**31
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in pool.bundle.items()) for node in nodes)


def fastest_with_room(train: Train, stage: TrainStage) -> int | None:
    """The fastest size for which the cluster's nodes have room; None where there is none for the least."""
    return _fastest(train, stage, [node for node in ray.nodes() if node["Alive"]])


def _fastest(train: Train, stage: TrainStage, nodes: Iterable[Mapping[str, Any]]) -> int | None:
    room = room_for(train.resources, (node["Resources"] for node in nodes))
    return next((size for size in group_sizes(train, stage) if size <= room), None)


def answering_nodes() -> list[Mapping[str, Any]]:
    """The nodes on which a task runs at once: one that has just ended is still listed for up to half a minute."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    answers = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[_answer.options(scheduling_strategy=there).remote()] = node
    answered, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER)
    found = []
    for answer in answered:
        with contextlib.suppress(RayError):  # of a node that was found out meanwhile
            ray.get(answer)
            found.append(nodes[answers[answer]])
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Any task at all."""


def wait_for_room(train: Train, stage: TrainStage) -> int:
    """The size of the next group: of a range, the fastest for which there is room on nodes that answer. A single number
    is asked for, and Ray waits for it.
    """
    if train.min_workers is None:
        return train.workers
    told = -math.inf
    while True:
        size = _fastest(train, stage, answering_nodes())
        if size is not None:
            return size
        if time.monotonic() - told > _REMIND:
            told = time.monotonic()
            log.warning(
                "train-%s: the cluster has no room for %d workers of %s; waiting for more nodes",
                *(stage.name, min(group_sizes(train, stage)), train.resources.bundle),
            )
        time.sleep(_LOOK)


def ask_autoscaler(train: Train, workers: int) -> None:
    """Have the cluster's autoscaler, if it has one, keep room for so many workers; 0: no longer."""
    request_resources(bundles=[train.resources.bundle] * workers)
