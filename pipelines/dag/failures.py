"""How often a partition is tried whose worker or node is lost, and what is said when it is tried no more.

The count is a partition's own, so that a long run on nodes that come and go does not end for how long it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from ray.exceptions import LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from storage.errors import UserError

log = logging.getLogger("ringworld")

CRASHES = 5
"""Times that a partition's worker may die, or be killed for the memory it takes."""
LOSSES = 20
"""Times that it may be lost in any way, with its node too: that is seldom the partition's doing."""

LOST = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""What Ray raises where the worker or the node of a task is gone; the same task may succeed elsewhere."""


@dataclass
class Failures:
    """What happened to the tasks of one stage, by partition or piece of one."""

    stage: str
    _by_task: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, task: str, error: Exception) -> None:
        """Count a failure, one of `LOST`. Raises UserError where the task has failed too often."""
        if isinstance(error, OutOfMemoryError):
            what = "its worker was killed for lack of memory"
        elif isinstance(error, WorkerCrashedError):
            what = "its worker died"
        else:
            what = "its node was lost"
        counts = self._by_task.setdefault(task, Counter())
        counts[what] += 1
        crashes = sum(count for kind, count in counts.items() if kind != "its node was lost")
        if crashes < CRASHES and counts.total() < LOSSES:
            log.warning("%s: %s: %s; trying again (failure %d)", self.stage, task, what, counts.total())
            return
        history = ", ".join(f"{kind} {count} {'times' if count > 1 else 'time'}" for kind, count in counts.items())
        raise UserError(
            f"{self.stage}: {task} failed {counts.total()} times: {history}; look for the reason in Ray's worker logs, "
            f"give each worker more memory (with more cpus a worker in the recipe there are fewer on a node) or leave "
            f"its data out, and run the same command again"
        ) from error
