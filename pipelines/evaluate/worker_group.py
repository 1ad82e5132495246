"""A group of workers that measure one cell after another together, and keep the model between them.

A group is as many Ray actors as share the context of a cell. A placement group gives all of them their places at once,
or none; they meet in a torch process group (gloo on CPUs, NCCL on GPUs) unless there is one alone. Every rank makes the
same call, and rank 0 commits the cell's record. A group is made anew after any failure that may have left its ranks
apart, since a process group does not outlive one of its ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.cluster.heartbeat import Heartbeat, end_worker
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver
from pipelines.dag.records import JsonRecords
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.task_table import TASKS
from pipelines.recipe import Resources
from storage.errors import is_transient

log = logging.getLogger("ringworld")

_MEET = datetime.timedelta(minutes=5)  # that ranks wait for each other when a group starts
_KILL_SECONDS = 30.0  # that killing processes may take
_TELL_SECONDS = 5.0  # that the other ranks have to say how they ended, after the first

Kind = Literal["error", "transient", "memory", "lost", "died", "hung"]
"""What became of a rank: error: `measure` raised; transient: a store that did not answer; memory: there was too little;
lost: another rank was; died: its process or node is gone; hung: it took too long.
"""
_TELLING: tuple[Kind, ...] = ("error", "memory", "died", "transient", "hung", "lost")
"""Of several ranks' ends, the first of these is the cause."""


@dataclass(frozen=True)
class Failure:
    """How a rank, or a cell, failed. details: a traceback, where there is one."""

    kind: Kind
    reason: str
    details: str = ""


@dataclass(frozen=True)
class Measured:
    """A cell's record, as it was committed."""

    record: dict[str, Any]


class WorkerGroup:
    """`size` workers of a pool. seconds: that a cell may take. Nothing waits for them here."""

    def __init__(self, job: ray.ObjectRef, pool: Resources, size: int, seconds: float) -> None:
        self._job, self._seconds = job, seconds
        self._places: Any = placement_group([pool.bundle] * size, strategy="PACK") if pool.bundle else None
        self._ranks = [self._worker(pool, index) for index in range(size)]
        address = self._ranks[0].address.remote(size) if size > 1 else None
        backend = "nccl" if pool.gpus else "gloo"
        self._pending: list[ray.ObjectRef] = [
            worker.join.remote(rank, size, address, backend, pool.cpus, seconds)
            for rank, worker in enumerate(self._ranks)
        ]
        self._answers: list[Measured | Failure | Heartbeat] = []
        self._processes: list[Heartbeat] = []
        self._since = 0.0
        self.is_ready = False
        """Whether all have their places and have met."""
        self.cell: Cell | None = None
        """What they measure."""

    @property
    def pending(self) -> Sequence[ray.ObjectRef]:
        """What to wait for."""
        return self._pending

    def measure(self, cell: Cell) -> None:
        """Begin with a cell; the group is ready and measures none."""
        self.cell, self._since, self._answers = cell, time.monotonic(), []
        self._pending = [worker.measure.remote(self._job, cell) for worker in self._ranks]

    def outcome(self) -> Measured | Failure | None:
        """How the cell, or the start, ended; None while it goes on. Raises UserError where nodes have other code."""
        done = self._collect(0.0)
        failures = [answer for answer in self._answers if isinstance(answer, Failure)]
        if failures and self._pending:  # what another rank says may be the cause
            self._collect(_TELL_SECONDS)
            failures = [answer for answer in self._answers if isinstance(answer, Failure)]
        elif not done and self.cell is not None and time.monotonic() - self._since > self._seconds:
            failures = [Failure("hung", f"not measured after {self._seconds:.0f} s (evaluate.cell_seconds)")]
        if failures:
            return min(failures, key=lambda one: _TELLING.index(one.kind))
        if not done:
            return None
        if self.cell is None:
            self._processes = [answer for answer in self._answers if isinstance(answer, Heartbeat)]
            self.is_ready = True
            return None
        self.cell = None
        return next(answer for answer in self._answers if isinstance(answer, Measured))

    def release(self, failure: Failure) -> bool:
        """After a failure: whether the group can go on with another cell."""
        self.cell = None
        if failure.kind == "hung":  # a process that is stopped does not hear of its end from Ray
            ray.wait([end_worker(one) for one in self._processes], num_returns=len(self._ranks), timeout=_KILL_SECONDS)
        return failure.kind in ("error", "transient") and len(self._ranks) == 1

    def close(self) -> None:
        """End the workers and give their places back."""
        with contextlib.suppress(RayError, ConnectionError):
            for worker in self._ranks:
                ray.kill(worker)
            if self._places is not None:
                remove_placement_group(self._places)

    def _worker(self, pool: Resources, index: int) -> Any:
        options: dict[str, Any] = {**pool.ray_options, "max_restarts": 0, "max_task_retries": 0}
        if self._places is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._places, index)
        return _Worker.options(**options).remote()  # type: ignore[attr-defined]

    def _collect(self, seconds: float) -> bool:
        """Take the answers that are there, waiting so long for all of them; whether all are."""
        ready, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=seconds)
        for reference in ready:
            try:
                with own_errors():
                    answer = ray.get(reference)
            except RayError as error:
                answer = _end_of(error)
            if answer is not None:
                self._answers.append(answer)
        return not self._pending


def _end_of(error: RayError) -> Failure:
    """Of a worker that did not answer. Ray tells in words alone that it killed an actor for its node's memory."""
    said = str(error)
    if isinstance(error, OutOfMemoryError) or "OOM" in said:
        return Failure("memory", "a worker was killed for lack of memory", said)
    if isinstance(error, RayTaskError):  # it could not meet the others
        return Failure("lost", _sentence(error.cause), said)
    return Failure("died", "a worker or its node died", said)


@ray.remote
class _Worker:
    """One rank."""

    @as_driver
    def address(self, size: int) -> tuple[str, int]:
        """Where the ranks meet: of this one's node, a port that was free."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=_MEET)
        return host, self._store.port

    @as_driver
    def join(
        self, rank: int, size: int, address: tuple[str, int] | None, backend: str, cpus: float, seconds: float
    ) -> Heartbeat:
        """Meet the other ranks; which process this is. seconds: that one waits for another amid a cell."""
        import torch
        import torch.distributed as dist
        import transformers
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        torch.set_num_threads(max(1, int(cpus)))
        transformers.utils.logging.disable_progress_bar()  # the terminal has one bar already
        self._rank, self._group = rank, None
        process, node = psutil.Process(), ray.get_runtime_context().get_node_id()
        born = Heartbeat(0, rank, process.pid, process.create_time(), node)
        if address is None:
            return born
        store = self._store if rank == 0 else TCPStore(*address, size, is_master=False, timeout=_MEET)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=seconds)
        )
        self._group = dist.group.WORLD
        device = "cuda" if backend == "nccl" else "cpu"
        dist.all_reduce(torch.zeros(1, device=device))  # without which NCCL exchanges nothing between two ranks alone
        return born

    @as_driver
    def measure(self, job: EvaluateJob, cell: Cell) -> Measured | Failure:
        """Measure a cell with the other ranks; rank 0 commits its record."""
        try:
            result = TASKS[cell.task].measure(replace(job, rank=self._rank, group=self._group), cell)
            record = {"partition": cell.name, "task": cell.task, "result": result}
            if self._rank == 0:
                job.of_task(cell.task).store.write_json(JsonRecords.name(cell.name), record)
            return Measured(record)
        except Exception as error:
            return Failure(_kind(error), _sentence(error), traceback.format_exc())


def _kind(error: Exception) -> Kind:
    import torch

    from model.inference.kv_decoder import RankLost

    if isinstance(error, RankLost | torch.distributed.DistError):
        return "lost"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    return "transient" if is_transient(error) else "error"


def _sentence(error: Exception) -> str:
    """The first line of what an error says, with its type unless it is one of ours, which are whole sentences."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    own = type(error).__name__ in ("UserError", "BadData")
    return line if own and line else f"{type(error).__name__}: {line}".removesuffix(": ")
