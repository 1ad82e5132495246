"""Places on a cluster: how many workers its nodes have room for, and the end of a wait for nodes that never come.

A wait goes on while nodes of the kind exist, however busy, and while an autoscaler launches nodes. Where neither is so
for `WAIT_SECONDS`, it ends with one sentence.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from pipelines.recipe import Resources
from storage.errors import UserError

log = logging.getLogger("ringworld")

WAIT_SECONDS = 600.0
"""How long a run waits for nodes of a kind that the cluster has none of."""
_REMINDER_SECONDS = 60.0
_LOOK_SECONDS = 10.0  # between two looks at the cluster while tasks run


def room_for(pool: Resources, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers of a pool fit on nodes of these resources."""
    if not pool.bundle:
        return 2**31
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in pool.bundle.items()) for node in nodes)


class PlacementWait:
    """A wait of `label`, e.g. a stage, for places for so many workers of a pool. May be sent to an actor."""

    def __init__(self, label: str, pool: Resources, workers: int = 1, seconds: float | None = None) -> None:
        self._label, self._pool, self._workers = label, pool, workers
        self._limit = WAIT_SECONDS if seconds is None else seconds
        self._since: float | None = None
        self._reminded = -math.inf

    def check(self) -> None:
        """Warn once a minute while the cluster's nodes, however busy, are too few. Raises UserError after the limit."""
        now = time.monotonic()
        if room_for(self._pool, (node["Resources"] for node in ray.nodes() if node["Alive"])) >= self._workers:
            self._since = None
            return
        is_launching = _nodes_are_launching()
        if self._since is None or is_launching:
            self._since = now
        wanted = f"{self._workers} x {self._pool.bundle}"
        if now - self._since > self._limit:
            raise UserError(
                f"{self._label}: the cluster has had no nodes for {wanted} for {self._limit:.0f} s, and no autoscaler "
                f"launches any; start such nodes or ask for less in the recipe, and run the same command again"
            )
        end = "while the autoscaler launches nodes" if is_launching else f"for {self._limit:.0f} s at most"
        self.remind(f"the cluster has no nodes for {wanted}; waiting {end}")

    def remind(self, why: str) -> None:
        """Warn why the wait goes on, once a minute."""
        if time.monotonic() - self._reminded > _REMINDER_SECONDS:
            self._reminded = time.monotonic()
            log.warning("%s: %s", self._label, why)


def first_ready(references: Sequence[ray.ObjectRef], wait: PlacementWait) -> ray.ObjectRef:
    """The first of these tasks that has ended. Raises UserError where `wait` finds that none can ever run."""
    while True:
        ready, _ = ray.wait(list(references), num_returns=1, timeout=_LOOK_SECONDS)
        if ready:
            return ready[0]
        wait.check()


def all_ready(references: Sequence[ray.ObjectRef], wait: PlacementWait) -> list[ray.ObjectRef]:
    """All of these tasks that have ended, at least one. Raises as `first_ready` does."""
    first = first_ready(references, wait)
    others = [reference for reference in references if reference != first]
    return [first, *ray.wait(others, num_returns=len(others), timeout=0)[0]] if others else [first]


def _nodes_are_launching() -> bool:
    """Whether an autoscaler of either of Ray's versions, if there is one, is bringing nodes."""
    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_launches or status.pending_nodes)
    report: dict[str, Any] = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report", {})
    return bool(report.get("pending_launches") or report.get("pending_nodes"))
