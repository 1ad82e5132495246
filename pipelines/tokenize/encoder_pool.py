"""A pool of encoder actors that grows with its queue: calls wait in one queue, and any free encoder takes the next.

In: how to make an encoder, how many there are at least and at most. Out: one actor with `encode`, for any number of
callers. Encoders are added while calls wait too long and ended when idle. One that dies is replaced, and others repeat
its calls. A call fails only if encoding fails, if `_CALL_CRASHES` encoders died with it, or if none can be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.placement import PlacementWait
from pipelines.cluster.progress import Meter
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver
from pipelines.recipe import EncoderResources
from storage.errors import UserError

log = logging.getLogger("ringworld")

_CALLS_PER_ENCODER = 2  # one runs, and the frames of the next are on their way
_CHECK_SECONDS = 0.5
_MAX_WAIT_SECONDS = 1.0  # a call that waits longer adds an encoder
_FAILED_STARTS = 5  # deaths in a row of encoders that were starting, after which a pool without any gives up
_MAX_PAUSE_SECONDS = 30.0  # after a start that failed
START_SECONDS = 600.0  # until an encoder is ready
_CALL_CRASHES = 5  # encoders that may die while they work on the same call
_POOL_RESTARTS = 20  # of the pool itself in a stage, on the driver's own node


@contextlib.contextmanager
def encoder_pool(
    encoder: Any,
    arguments: tuple[Any, ...],
    size: EncoderResources,
    wait: PlacementWait | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator[Any]:
    """A pool for the length of the block: the handle of an `_EncoderPool`, on the driver's node.

    size: how many encoders there are, and how long one may idle; `encoder` has its resources as options already. wait:
    for a place for the first encoder; None: without an end. start_seconds: for which an encoder may load its weights,
    or wait for its place, before another is started instead. Raises UserError where the pool dies too often.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": _POOL_RESTARTS, "max_task_retries": _POOL_RESTARTS, "scheduling_strategy": here}
    pool = _EncoderPool.options(**options).remote(encoder, arguments, size, wait, start_seconds)  # type: ignore[attr-defined]
    try:
        yield pool
    except RayActorError as error:
        raise UserError(
            f"tokenize: the pool of encoders on the driver's node died more than {_POOL_RESTARTS} times "
            f"({_first_line(error)}); look for the reason in Ray's worker logs, and run the same command again"
        ) from error
    finally:
        with contextlib.suppress(RayError):
            ray.get(pool.close.remote(), timeout=10)
        ray.kill(pool)


def wait_until_ready(pool: Any) -> int:
    """Wait until a pool has its least number of encoders; how many it has. Raises what their `load` raised."""
    with own_errors():
        return int(ray.get(pool.ready.remote()))


@dataclass(order=True)
class _Call:
    since: float
    frames: ray.ObjectRef = field(compare=False)
    media: str = field(compare=False)
    codes: asyncio.Future[Any] = field(compare=False)
    crashes: int = field(default=0, compare=False)


class _CallQueue(asyncio.PriorityQueue[_Call]):
    """Calls that no encoder has, the oldest first: also one that comes back from an encoder that died."""

    _queue: list[_Call]

    @property
    def oldest(self) -> _Call | None:
        return self._queue[0] if self._queue else None


@dataclass(eq=False)
class _Encoder:
    """One actor of the pool. calls: it works on the first. last_call: when it last had one. started: it is ready."""

    actor: Any
    last_call: float
    calls: list[_Call] = field(default_factory=list)
    started: bool = False
    task: asyncio.Task[None] = field(init=False)


@ray.remote(num_cpus=0)
class _EncoderPool:
    """The pool. Its state may be lost: after a restart it starts new encoders, and Ray repeats the calls.

    encoder: an actor class with options and `arguments`; its `load()` makes it ready for `encode(frames)`.
    """

    @as_driver
    def __init__(
        self,
        encoder: Any,
        arguments: tuple[Any, ...],
        size: EncoderResources,
        wait: PlacementWait | None,
        start_seconds: float,
    ) -> None:
        self._make = lambda: encoder.remote(*arguments)
        self._size, self._wait, self._start_seconds = size, wait, start_seconds
        self._queue = _CallQueue()
        self._encoders: list[_Encoder] = []
        self._failed_starts = 0
        self._broken: Exception | None = None
        self._watch: asyncio.Task[None] | None = None
        self._meter = Meter("tokenize")

    async def encode(self, frames: list[ray.ObjectRef], media: str = "") -> Any:
        """What an encoder returns for the frames behind the one reference in the list; raises what it raises.

        media: whose frames they are, for an error.
        """
        self._start()
        loop = asyncio.get_running_loop()
        call = _Call(loop.time(), frames[0], media, loop.create_future())
        self._queue.put_nowait(call)
        return await call.codes

    async def ready(self) -> int:
        """Wait until the least number of encoders is ready; how many are."""
        self._start()
        while (count := sum(encoder.started for encoder in self._encoders)) < self._size.min_workers:
            self._start()
            await asyncio.sleep(0.05)
        return count

    async def close(self) -> None:
        """End all encoders."""
        if self._watch is not None:
            self._watch.cancel()
        for encoder in list(self._encoders):
            self._end(encoder)

    def _start(self) -> None:
        """Start the pool where it does not run yet. Raises the error that broke it."""
        if self._broken is not None:
            raise self._broken
        if self._watch is None:
            self._add(self._size.min_workers)
            self._watch = asyncio.get_running_loop().create_task(self._watching())

    async def _watching(self) -> None:
        loop = asyncio.get_running_loop()
        while self._broken is None:
            await asyncio.sleep(_CHECK_SECONDS)
            now, starting = loop.time(), sum(not encoder.started for encoder in self._encoders)
            self._meter.set(encoders=len(self._encoders) - starting, encoder_queue=self._queue.qsize())
            self._add(self._size.min_workers - len(self._encoders))
            if self._wait and starting == len(self._encoders):
                try:
                    self._wait.check()
                except UserError as error:
                    self._break(error)
            oldest = self._queue.oldest
            if oldest and now - oldest.since > _MAX_WAIT_SECONDS and not starting:
                self._add(min(1 + len(self._encoders) // 2, self._size.workers - len(self._encoders)))
            if oldest is None:
                self._end_idle(now)
            self._end_stuck(now)

    def _add(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            encoder = _Encoder(self._make(), loop.time())
            self._encoders.append(encoder)
            encoder.task = loop.create_task(self._serving(encoder))

    def _end_idle(self, now: float) -> None:
        """Only while no call waits: an encoder that takes long to start while one does is not idle."""
        idle = [one for one in self._encoders if not one.calls and now - one.last_call > self._size.idle_seconds]
        idle.sort(key=lambda encoder: encoder.started)  # first those that find no room in the cluster
        for encoder in idle[: max(0, len(self._encoders) - self._size.min_workers)]:
            self._end(encoder)

    def _end_stuck(self, now: float) -> None:
        """One that never gets ready would keep the pool from growing."""
        for one in list(self._encoders):
            if not one.started and now - one.last_call > self._start_seconds:
                log.warning(
                    "tokenize: an encoder is not ready after %.0f s; another is started instead", now - one.last_call
                )
                self._end(one)

    def _end(self, encoder: _Encoder) -> None:
        self._encoders.remove(encoder)
        encoder.task.cancel()
        ray.kill(encoder.actor)

    async def _serving(self, encoder: _Encoder) -> None:
        """An encoder's life, until it dies or is ended."""
        try:
            await encoder.actor.load.remote()
            encoder.started, self._failed_starts = True, 0
            async with asyncio.TaskGroup() as calls:
                for _ in range(_CALLS_PER_ENCODER):
                    calls.create_task(self._taking(encoder))
        except* RayActorError as errors:
            log.warning("tokenize: an encoder died (%s); another takes its place", _first_line(errors.exceptions[0]))
            self._take_back(encoder, errors.exceptions[0])
            if not encoder.started:
                await self._not_started(errors.exceptions[0], _FAILED_STARTS)
        except* Exception as errors:  # raised by load(): there are no weights, or not those of the recipe
            await self._not_started(errors.exceptions[0], 1)
        if encoder in self._encoders:
            self._end(encoder)

    async def _not_started(self, error: BaseException, attempts: int) -> None:
        """Pause before the next encoder is added; after so many attempts in a row, fail all calls if there is none."""
        self._failed_starts += 1
        if self._failed_starts < attempts or any(encoder.started for encoder in self._encoders):
            log.warning("tokenize: an encoder cannot be started (%s)", str(error).strip().split("\n")[-1])
            await asyncio.sleep(min(_MAX_PAUSE_SECONDS, 2.0**self._failed_starts))
            return
        assert isinstance(error, Exception)
        self._break(error)

    def _break(self, error: Exception) -> None:
        """Fail all calls, also later ones."""
        self._broken = error
        while not self._queue.empty():
            self._queue.get_nowait().codes.set_exception(error)

    def _take_back(self, encoder: _Encoder, error: BaseException) -> None:
        """The calls of an encoder that died wait again; the one it worked on fails when too many died with it."""
        for position, call in enumerate(encoder.calls):
            call.crashes += position == 0
            if call.crashes < _CALL_CRASHES:
                self._queue.put_nowait(call)
            elif not call.codes.done():
                call.codes.set_exception(
                    UserError(
                        f"tokenize: {call.crashes} encoders died one after another with the same frames of "
                        f"{call.media} ({_first_line(error)}); look for the reason in Ray's worker logs, give each "
                        f"encoder more memory or leave these media out, and run the same command again"
                    )
                )

    async def _taking(self, encoder: _Encoder) -> None:
        while True:
            call = await self._queue.get()
            encoder.calls.append(call)
            try:
                codes = await encoder.actor.encode.remote(call.frames)
            except RayActorError:
                raise
            except Exception as error:  # encoding failed, or the caller died, and its frames with it
                call.codes.set_exception(error)
            else:
                call.codes.set_result(codes)
            encoder.calls.remove(call)
            encoder.last_call = asyncio.get_running_loop().time()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
