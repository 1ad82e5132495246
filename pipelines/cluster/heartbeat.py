"""Heartbeats of training workers, collected in one place, so that a worker that hangs is found, named and ended.

A thread of every worker sends once a second to a `Watch`, an actor on the driver's node, at which step and in which
part of it the worker's main thread is. A silent worker has stopped or lost its network; where all send but none gets
on, the worker that is furthest behind is the one that the others wait for. Starting, evaluating, saving and exporting
may take long, but in pieces, which count as progress, and a worker that has done its own share reports that it waits.
Nothing heavy is imported here: the actor is a process of its own.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from pipelines.cluster.nodes import on_node

PARTS = ("start", "evaluate", "save", "load", "train", "export")
"""The parts of a worker's step, in their order; a step's number is that of the updates made before it."""
_INTERVAL_SECONDS = 1.0  # between two heartbeats of a worker
_STEP = frozenset({"load", "train"})  # the others are made of pieces, and of waiting for others
START_SECONDS = 300.0
"""A start's pieces may take so long, whatever the limit: modules are imported, kernels compiled, stores first asked."""


class Stop(enum.IntEnum):
    """When a group of workers is to end. Where ranks differ, as one has not heard of it yet, the largest counts.

    AT_CHECKPOINT: after the next checkpoint, for a group of another size. AFTER_STEP: after this step and a checkpoint
    of it, because the run is to end.
    """

    NO = 0
    AT_CHECKPOINT = 1
    AFTER_STEP = 2


@dataclass(frozen=True)
class Heartbeat:
    """A worker's place. attempt: the number of its group. born: when its process started. pieces: done of its current
    part. waits: it has done its own share of that part and waits for the others.
    """

    attempt: int
    rank: int
    pid: int
    born: float
    node: str
    step: int = 0
    part: str = "start"
    pieces: int = 0
    waits: bool = False


@dataclass(frozen=True)
class WorkerStatus:
    """A worker's last heartbeat, the seconds since it came, and since one reported any progress."""

    beat: Heartbeat
    silent: float
    still: float


@dataclass(frozen=True)
class Hang:
    """The workers that the others wait for, and the evidence."""

    workers: tuple[Heartbeat, ...]
    reason: str


def find_hang(statuses: Sequence[WorkerStatus], limit: float, size: int) -> Hang | None:
    """The workers that hang of a group of `size`, if any: silent for `limit` seconds, or furthest behind where all that
    ever sent a heartbeat make no progress for as long. Where a worker never sent any, the result has those that wait
    for it, the only processes that are known.
    """
    if silent := [status for status in statuses if status.silent > limit]:
        longest = max(status.silent for status in silent)
        return _hang(silent, f"not answered for {longest:.0f} s")
    limits = {"start": max(limit, START_SECONDS)}
    if not statuses or any(status.still <= limits.get(status.beat.part, limit) for status in statuses):
        return None
    still = min(status.still for status in statuses)
    if missing := sorted(set(range(size)) - {status.beat.rank for status in statuses}):
        workers = tuple(status.beat for status in statuses)
        ranks = ", ".join(f"rank {rank}" for rank in missing)
        return Hang(workers, f"{ranks} not heard of while {_names(workers)} waited for {still:.0f} s")
    last = min(_progress(status.beat) for status in statuses)
    return _hang([status for status in statuses if _progress(status.beat) == last], f"not got on for {still:.0f} s")


def _hang(statuses: Sequence[WorkerStatus], how: str) -> Hang:
    workers = tuple(status.beat for status in statuses)
    return Hang(workers, f"{_names(workers)} {how}, amid step {workers[0].step}: {workers[0].part}")


def _progress(beat: Heartbeat) -> tuple[int, int, bool]:
    return beat.step, PARTS.index(beat.part), beat.waits and beat.part not in _STEP


def _names(workers: Sequence[Heartbeat]) -> str:
    names = ", ".join(f"rank {beat.rank} (process {beat.pid} on node {beat.node[:8]})" for beat in workers)
    return f"{names} {'have' if len(workers) > 1 else 'has'}"


def _position(beat: Heartbeat) -> tuple[int, str, int]:
    """What changes with progress. In a step pieces do not count: another thread may write a checkpoint meanwhile."""
    return beat.step, beat.part, 0 if beat.part in _STEP else beat.pieces


class HeartbeatSender:
    """A worker's side, a context manager that sends heartbeats; `at` and `piece` report what its main thread does.

    stop: what the driver asks of the group, as far as this worker has heard.
    """

    def __init__(self, watch: Any, attempt: int, rank: int) -> None:
        process, node = psutil.Process(), ray.get_runtime_context().get_node_id()
        self._watch, self.stop = watch, Stop.NO
        self._beat = Heartbeat(attempt, rank, process.pid, process.create_time(), node)
        self._changing = threading.Lock()  # a checkpoint is written in another thread than the main one
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> HeartbeatSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, step: int, part: str) -> None:
        """The main thread begins this part, one of PARTS, of this step."""
        with self._changing:
            self._beat = replace(self._beat, step=step, part=part, pieces=0)

    def piece(self, waits: bool) -> None:
        """A piece of the current part is done. waits: the worker's own share is done, and it waits for the others."""
        with self._changing:
            self._beat = replace(self._beat, pieces=self._beat.pieces + 1, waits=waits)

    def _run(self) -> None:
        while True:
            answer = self._watch.beat.remote(self._beat)
            if self._ended.wait(_INTERVAL_SECONDS):
                return
            if ray.wait([answer], timeout=0)[0]:
                with contextlib.suppress(RayError):  # the driver and its watch are gone: Ray ends this worker
                    self.stop = ray.get(answer)


class Watch:
    """The driver's side, as an actor: every worker's last heartbeat, rank 0's reports, and the requests to the group.

    What runs elsewhere on the cluster may use it for its reports alone.
    """

    def __init__(self) -> None:
        self._attempt = 0
        self._beats: dict[int, tuple[Heartbeat, float, float]] = {}
        self._last: tuple[int, dict[str, float]] = (0, {})
        self._first_report: float | None = None
        self._finished = False
        self._stop = Stop.NO

    def begin(self, attempt: int) -> None:
        """A new group: forget the one before, whose late heartbeats no longer count."""
        self._attempt, self._beats, self._first_report, self._stop = attempt, {}, None, Stop.NO

    def beat(self, beat: Heartbeat) -> Stop:
        """Take a worker's heartbeat; whether its group is to stop."""
        if beat.attempt != self._attempt:
            return Stop.NO
        now = time.monotonic()
        before = self._beats.get(beat.rank)
        same = before is not None and _position(before[0]) == _position(beat)
        self._beats[beat.rank] = (beat, now, before[2] if before is not None and same else now)
        return self._stop

    def statuses(self) -> list[WorkerStatus]:
        """Of all workers of the group that have sent a heartbeat."""
        now = time.monotonic()
        return [WorkerStatus(beat, now - heard, now - moved) for beat, heard, moved in self._beats.values()]

    def report(self, step: int, figures: dict[str, float]) -> None:
        """So many steps are done, the last with these figures."""
        self._last = (step, figures)
        self._first_report = self._first_report or time.time()

    def last(self) -> tuple[int, dict[str, float]]:
        """What was reported last."""
        return self._last

    def first_report(self) -> float | None:
        """When the group's first step was reported, in seconds since the epoch."""
        return self._first_report

    def ask_to_stop(self, when: Stop) -> None:
        """The group is to end in order."""
        self._stop = when

    def finish(self) -> None:
        """The stage's model is exported."""
        self._finished = True

    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._finished


def start_watch() -> Any:
    """A `Watch` on the driver's own node, so that no other node's end takes it along."""
    here = on_node(ray.get_runtime_context().get_node_id())
    return ray.remote(num_cpus=0)(Watch).options(scheduling_strategy=here).remote()


def end_worker(beat: Heartbeat) -> Any:
    """Kill a worker's process on its node; a stopped one reacts to nothing else. Returns the reference to wait on."""
    return _kill.options(scheduling_strategy=on_node(beat.node)).remote(beat.pid, beat.born)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float) -> None:
    """Kill the process, unless another one has its number by now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if pid != os.getpid() and psutil.Process(pid).create_time() == born:
            psutil.Process(pid).kill()
