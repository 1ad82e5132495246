"""What the driver does while a group of workers trains: end workers that hang, make room for more workers where there
is some, and have the group commit a checkpoint before a run that gets SIGTERM ends.

A worker that hangs is killed where it runs; Ray Train then sees it dead and ends the group, whose stage starts again
from its last checkpoint. A group that could be larger is asked to end at its next checkpoint: nothing is repeated. At
SIGTERM it is asked to end after its step; where that and the checkpoint take longer than `train.grace_seconds`, or no
step has been made, the run ends at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.cluster.heartbeat import Heartbeat, Stop, end_worker, find_hang
from pipelines.cluster.stop_signals import stop_signals
from pipelines.train.group_size import fastest_with_room, rounds
from pipelines.train.job import TrainJob

log = logging.getLogger("ringworld")

_LOOK = 1.0  # seconds between two looks at the workers
_ROOM = 2.0  # and at the cluster
_AGAIN = 60.0  # until a worker that could not be ended is ended again
_ANSWER = 60.0  # for the watch to answer
_KILL = 60.0  # for a kill; a node that does not answer as long is left to Ray's own health checks


class Supervisor:
    """Watches one group in a thread of its own, for the length of a `with` block."""

    def __init__(self, job: TrainJob, watch: Any, size: int) -> None:
        self.hang: str | None = None
        """Which workers hung and were killed, if any."""
        self.since: float | None = None
        """When that was known, in seconds since the epoch."""
        self._train, self._stage, self._watch, self._size = job.recipe.training, job.stage, watch, size
        self._label = f"train-{job.stage.name}"
        self._next_look, self._next_growth = -math.inf, time.monotonic() + _ROOM
        self._deadline: float | None = None  # of a checkpoint after SIGTERM
        self._is_asked = False  # for that checkpoint
        self._warned: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK):
            try:
                self._look()
            except Exception as error:  # of any kind: without this thread the group would no longer be watched
                if str(error) not in self._warned:
                    self._warned.add(str(error))
                    log.warning("%s: the workers cannot be watched: %s; trying again", self._label, error)

    def _look(self) -> None:
        now = time.monotonic()
        if stop_signals.received is not None:
            self._end_run(now)
        if now >= self._next_look:
            self._look_for_a_hang()
        if self._train.min_workers is not None and now >= self._next_growth:
            self._next_growth = now + _ROOM
            if self._grow():
                self._next_growth = math.inf

    def _end_run(self, now: float) -> None:
        """Ask for a checkpoint, once, and interrupt the run when it is too late for it."""
        grace = self._train.grace_seconds
        if self._deadline is None:
            self._deadline = now + grace
        if now >= self._deadline:
            self._deadline = math.inf
            stop_signals.interrupt()
        elif not self._is_asked:  # a watch that fails to answer is asked again
            first = ray.get(self._watch.first_report.remote(), timeout=min(_ANSWER, self._deadline - now))
            if first is None:  # there is nothing to save
                self._deadline = now
            else:
                log.warning("%s: saving a checkpoint after this step, in %g s at most, to end then", self._label, grace)
                self._watch.ask_to_stop.remote(Stop.AFTER_STEP)
            self._is_asked = True

    def _look_for_a_hang(self) -> None:
        statuses = ray.get(self._watch.statuses.remote(), timeout=_ANSWER)
        hang = find_hang(statuses, self._train.hang_seconds, self._size)
        if hang is None:
            return
        if self.hang is None:
            self.hang, self.since = hang.reason, time.time()
        log.warning("%s: %s; ending it, to go on from the last checkpoint", self._label, hang.reason)
        are_ended = [self._end(worker) for worker in hang.workers]
        self._next_look = math.inf if all(are_ended) else time.monotonic() + _AGAIN

    def _end(self, worker: Heartbeat) -> bool:
        """Whether the worker's process is at an end."""
        try:
            ray.get(end_worker(worker), timeout=_KILL)
        except RayError as error:
            log.warning("%s: rank %d could not be ended: %s", self._label, worker.rank, error)
            return False
        return True

    def _grow(self) -> bool:
        size = fastest_with_room(self._train, self._stage)
        if size is None or rounds(self._stage, size) >= rounds(self._stage, self._size):
            return False
        message = "%s: the cluster has room for %d workers; going on with them at the next checkpoint"
        log.info(message, self._label, size)
        ray.get(self._watch.ask_to_stop.remote(Stop.AT_CHECKPOINT), timeout=_ANSWER)
        return True
