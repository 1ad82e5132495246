"""What each training worker is at, seen in one place, so that one that hangs is found, named and ended.

A thread of every worker tells a `Watch`, an actor beside the driver, once a second at which step and in which part of
it the worker's main thread is. Whoever is silent has stopped or lost its network; where all are well but nothing moves,
the worker that is furthest behind is the one that the others wait for. Starting, saving and exporting may take long,
but in pieces, which count as movement, and a worker that has done its own part says that it waits. Nothing heavy is
imported here: the actor is a process of its own.
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

INTERVAL = 1.0
"""Seconds between two beats of a worker."""
PARTS = ("start", "save", "load", "train", "export")
"""What a worker is at, in the order in which it comes to it within a step, the updates made being its number."""
_STEP = frozenset({"load", "train"})  # the others are made of pieces, and of waiting for others
START_SECONDS = 300.0
"""A start's pieces may take so long, whatever the limit: modules are imported, kernels compiled, stores first asked."""


class Stop(enum.IntEnum):
    """When a group of workers is to end; where ranks differ, because one has not yet heard of it, the largest holds."""

    NO = 0
    AT_CHECKPOINT = 1
    """After the next checkpoint, for a group of another size."""
    AFTER_STEP = 2
    """After this step, and a checkpoint of it: the run was asked to end."""


@dataclass(frozen=True)
class Heartbeat:
    """What a worker says of itself. attempt: of how many groups before it. born: of the process, for `end_worker`.
    pieces: done so far of what it is at. waits: it has done its own part of that, and waits for the others.
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
    """A worker's last beat, the seconds since it came, and since it reported anything new."""

    beat: Heartbeat
    silent: float
    still: float


@dataclass(frozen=True)
class Hang:
    """The workers that the others wait for, and how that is seen."""

    workers: tuple[Heartbeat, ...]
    reason: str


def find_hang(statuses: Sequence[WorkerStatus], limit: float, size: int) -> Hang | None:
    """Who of a group of `size` hangs, if anyone: not heard of for `limit` seconds, or furthest behind where all that
    were ever heard of stand still for as long. Where someone was never heard of, those who wait for it are named with
    it, for theirs are the only processes known.
    """
    silent = [status for status in statuses if status.silent > limit]
    if silent:
        workers = tuple(status.beat for status in silent)
        longest = max(status.silent for status in silent)
        return Hang(workers, f"{_names(workers)} not answered for {longest:.0f} s, amid {_place(workers[0])}")
    if not statuses or any(one.still <= _patience(one.beat, limit) for one in statuses):
        return None
    still = min(status.still for status in statuses)
    missing = sorted(set(range(size)) - {status.beat.rank for status in statuses})
    if missing:
        workers = tuple(status.beat for status in statuses)
        ranks = ", ".join(f"rank {rank}" for rank in missing)
        return Hang(workers, f"{ranks} not heard of while {_names(workers)} waited for {still:.0f} s")
    last = min(_progress(status.beat) for status in statuses)
    workers = tuple(status.beat for status in statuses if _progress(status.beat) == last)
    return Hang(workers, f"{_names(workers)} not got on for {still:.0f} s, amid {_place(workers[0])}")


def _patience(beat: Heartbeat, limit: float) -> float:
    return max(limit, START_SECONDS) if beat.part == "start" else limit


def _progress(beat: Heartbeat) -> tuple[int, int, bool]:
    return beat.step, PARTS.index(beat.part), beat.waits and beat.part not in _STEP


def _names(workers: Sequence[Heartbeat]) -> str:
    names = ", ".join(f"rank {beat.rank} (process {beat.pid} on node {beat.node[:8]})" for beat in workers)
    return f"{names} {'have' if len(workers) > 1 else 'has'}"


def _place(beat: Heartbeat) -> str:
    return f"step {beat.step}: {beat.part}"


def _position(beat: Heartbeat) -> tuple[int, str, int]:
    """What changes as a worker gets on. What a thread writes of a checkpoint meanwhile does not excuse a step."""
    return beat.step, beat.part, 0 if beat.part in _STEP else beat.pieces


class HeartbeatSender:
    """A worker's side: `at` says what its main thread begins. A context manager, which beats meanwhile.

    stop: what the driver asks of the group, as far as this worker knows.
    """

    def __init__(self, watch: Any, attempt: int, rank: int) -> None:
        process = psutil.Process()
        node = ray.get_runtime_context().get_node_id()
        self.stop = Stop.NO
        self._watch = watch
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
        """The main thread is at this part, one of PARTS, of this step."""
        with self._changing:
            self._beat = replace(self._beat, step=step, part=part, pieces=0)

    def piece(self, waits: bool) -> None:
        """The worker gets on with what it is at. waits: its own part is done, and it waits for the others."""
        with self._changing:
            self._beat = replace(self._beat, pieces=self._beat.pieces + 1, waits=waits)

    def _run(self) -> None:
        while True:
            answer = self._watch.beat.remote(self._beat)
            if self._ended.wait(INTERVAL):
                return
            if ray.wait([answer], timeout=0)[0]:
                with contextlib.suppress(RayError):  # the driver and its watch are gone: Ray ends this worker
                    self.stop = ray.get(answer)


class Watch:
    """The driver's side, as an actor: the last beat of every worker, what rank 0 reports, and what is asked of it."""

    def __init__(self) -> None:
        self._attempt = 0
        self._beats: dict[int, tuple[Heartbeat, float, float]] = {}
        self._last: tuple[int, dict[str, float]] = (0, {})
        self._first_report: float | None = None
        self._finished = False
        self._stop = Stop.NO

    def begin(self, attempt: int) -> None:
        """A new group: forget the one before, whose late beats no longer count."""
        self._attempt, self._beats = attempt, {}
        self._first_report, self._stop = None, Stop.NO

    def beat(self, beat: Heartbeat) -> Stop:
        """Take a worker's beat; whether its group is to stop."""
        if beat.attempt != self._attempt:
            return Stop.NO
        now = time.monotonic()
        before = self._beats.get(beat.rank)
        same = before is not None and _position(before[0]) == _position(beat)
        self._beats[beat.rank] = (beat, now, before[2] if before is not None and same else now)
        return self._stop

    def statuses(self) -> list[WorkerStatus]:
        """All workers of the group that have been heard of."""
        now = time.monotonic()
        return [WorkerStatus(beat, now - heard, now - moved) for beat, heard, moved in self._beats.values()]

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Rank 0 has made so many steps."""
        self._last = (step, figures)
        if self._first_report is None:
            self._first_report = time.time()

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
        """Whether it is."""
        return self._finished


def start_watch() -> Any:
    """A `Watch` on the driver's own node, so that no other node's end takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Watch).options(scheduling_strategy=here).remote()


def end_worker(beat: Heartbeat) -> Any:
    """Kill a worker's process where it runs; a stopped one heeds nothing else. Returns the reference to wait on."""
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    return _kill.options(scheduling_strategy=there).remote(beat.pid, beat.born)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, born: float) -> None:
    """End the process, if it is still the one that was meant."""
    try:
        if pid != os.getpid() and psutil.Process(pid).create_time() == born:
            psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return
