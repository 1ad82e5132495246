"""Tasks and actors on chosen nodes of the cluster, and a task on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Scheduling of a task or actor on this node and no other."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def ask_nodes(task: Any, seconds: float) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Run a task without arguments on every living node; the node and its answer, of those that answer in `seconds`.

    A node that has just ended is listed as living for up to half a minute.
    """
    nodes = {
        task.options(scheduling_strategy=on_node(node["NodeID"])).remote(): node
        for node in ray.nodes()
        if node["Alive"]
    }
    ready, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=seconds)
    for answer in ready:
        with contextlib.suppress(RayError):  # the node ended meanwhile
            yield nodes[answer], ray.get(answer)
