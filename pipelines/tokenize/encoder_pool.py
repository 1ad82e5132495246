"""A pool of encoder actors that grows with its queue: calls wait in one line, and whichever encoder is free takes the
next.

In: how to make an encoder, how many there are at least and at most. Out: one actor with `encode`, for any number of
callers. Encoders are added while calls wait longer than they should and taken away when they have had nothing to do.
One that dies is replaced and its calls are made again by others. A call fails only if encoding itself fails, if it has
been with `_CALL_CRASHES` encoders that died, or if no encoder can be had at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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
from storage.errors import UserError

log = logging.getLogger("ringworld")

_CALLS_UNDER_WAY = 2  # of an encoder: one runs, and the frames of the next are on their way to it
_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 1.0  # a call that waits longer wants one more encoder
_FAILED_STARTS = 5  # deaths in a row of encoders that were starting, after which a pool without any gives up
_LONGEST_PAUSE_SECONDS = 30.0  # after a start that failed
_CALL_CRASHES = 5  # encoders that may die while they have the same call
_POOL_RESTARTS = 20  # of the pool itself in a stage, on the driver's own node


@dataclass(frozen=True)
class PoolSize:
    """How many encoders there are at least and at most, and how long one may idle before it goes, in seconds."""

    least: int
    most: int
    idle_seconds: float = 60.0


@contextlib.contextmanager
def encoder_pool(
    encoder: Any, arguments: tuple[Any, ...], size: PoolSize, wait: PlacementWait | None = None
) -> Iterator[Any]:
    """A pool for the length of the block: the handle of an `_EncoderPool`, on the driver's node.

    wait: for a place for the first encoder; None: without an end. Raises UserError where the pool dies too often.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lives = {"max_restarts": _POOL_RESTARTS, "max_task_retries": _POOL_RESTARTS, "scheduling_strategy": here}
    pool = _EncoderPool.options(**lives).remote(encoder, arguments, size, wait)  # type: ignore[attr-defined]
    try:
        yield pool
    except RayActorError as error:
        raise UserError(
            f"tokenize: the pool of encoders on the driver's node died more than {_POOL_RESTARTS} times "
            f"({_first_line(error)}); look for its reason in Ray's worker logs, and run the same command again"
        ) from error
    finally:
        with contextlib.suppress(RayError):
            ray.get(pool.close.remote(), timeout=10)
        ray.kill(pool)


def wait_until_ready(pool: Any) -> int:
    """Wait until a pool has its least number of encoders, and say how many it has. Raises what their `load` raised."""
    with own_errors():
        count: int = ray.get(pool.ready.remote())
    return count


@dataclass(order=True)
class _Call:
    since: float
    number: int
    frames: ray.ObjectRef = field(compare=False)
    media: str = field(compare=False)
    codes: asyncio.Future[Any] = field(compare=False)
    crashes: int = field(default=0, compare=False)


class _Line(asyncio.PriorityQueue[_Call]):
    """Calls that no encoder has; the oldest is next, also when it has been with one that died."""

    _queue: list[_Call]

    @property
    def oldest(self) -> _Call | None:
        return self._queue[0] if self._queue else None


@dataclass(eq=False)
class _Encoder:
    """One actor of the pool. calls: that it has now; it works on the first. last: when it last had one. started:
    whether it is ready.
    """

    actor: Any
    last: float
    calls: list[_Call] = field(default_factory=list)
    started: bool = False
    task: asyncio.Task[None] | None = None


@ray.remote(num_cpus=0)
class _EncoderPool:
    """The pool. It holds no state that cannot be lost: restarted, it starts encoders anew and Ray repeats the calls.

    encoder: an actor class with its options; its actors have `load()`, which makes them ready, and `encode(frames)`.
    arguments: of its constructor.
    """

    @as_driver
    def __init__(
        self, encoder: Any, arguments: tuple[Any, ...], size: PoolSize, wait: PlacementWait | None = None
    ) -> None:
        self._make = lambda: encoder.remote(*arguments)
        self._size, self._wait = size, wait
        self._line = _Line()
        self._numbers = itertools.count()
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
        call = _Call(loop.time(), next(self._numbers), frames[0], media, loop.create_future())
        self._line.put_nowait(call)
        return await call.codes

    async def ready(self) -> int:
        """Wait until the least number of encoders is ready, and say how many are."""
        self._start()
        while (count := sum(one.started for one in self._encoders)) < self._size.least:
            self._start()
            await asyncio.sleep(0.05)
        return count

    async def close(self) -> None:
        """End all encoders."""
        if self._watch is not None:
            self._watch.cancel()
        for one in list(self._encoders):
            self._end(one)

    def _start(self) -> None:
        """See that the pool runs. Raises what broke it."""
        if self._broken is not None:
            raise self._broken
        if self._watch is None:
            self._add(self._size.least)
            self._watch = asyncio.get_running_loop().create_task(self._watching())

    async def _watching(self) -> None:
        loop = asyncio.get_running_loop()
        while self._broken is None:
            await asyncio.sleep(_LOOK_SECONDS)
            now, starting = loop.time(), sum(not one.started for one in self._encoders)
            self._meter.set(encoders=len(self._encoders) - starting, encoder_queue=self._line.qsize())
            self._add(self._size.least - len(self._encoders))
            if self._wait and starting == len(self._encoders):
                try:
                    self._wait.check()
                except UserError as error:
                    self._break(error)
            oldest = self._line.oldest
            if oldest and now - oldest.since > _PATIENCE_SECONDS and not starting:
                self._add(min(1 + len(self._encoders) // 2, self._size.most - len(self._encoders)))
            if oldest is None:
                self._end_idle(now)

    def _add(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            one = _Encoder(self._make(), loop.time())
            self._encoders.append(one)
            one.task = loop.create_task(self._serving(one))

    def _end_idle(self, now: float) -> None:
        """Only while no call waits: then one that takes long to start is not idle, but awaited."""
        idle = [one for one in self._encoders if not one.calls and now - one.last > self._size.idle_seconds]
        idle.sort(key=lambda one: one.started)  # first those that find no room in the cluster
        for one in idle[: max(0, len(self._encoders) - self._size.least)]:
            self._end(one)

    def _end(self, one: _Encoder) -> None:
        self._encoders.remove(one)
        if one.task is not None:
            one.task.cancel()
        ray.kill(one.actor)

    async def _serving(self, one: _Encoder) -> None:
        """An encoder's life, until it dies or is ended."""
        try:
            await one.actor.load.remote()
            one.started, self._failed_starts = True, 0
            async with asyncio.TaskGroup() as calls:
                for _ in range(_CALLS_UNDER_WAY):
                    calls.create_task(self._taking(one))
        except* RayActorError as errors:
            log.warning("tokenize: an encoder died (%s); another takes its place", _first_line(errors.exceptions[0]))
            self._take_back(one, errors.exceptions[0])
            if not one.started:
                await self._not_started(errors.exceptions[0], _FAILED_STARTS)
        except* Exception as errors:  # raised by load(): there are no weights, or not those of the recipe
            await self._not_started(errors.exceptions[0], 1)
        if one in self._encoders:
            one.task = None
            self._end(one)

    async def _not_started(self, error: BaseException, attempts: int) -> None:
        """Pause before the next encoder is added; after so many attempts in a row, fail all calls if there is none."""
        self._failed_starts += 1
        if self._failed_starts < attempts or any(one.started for one in self._encoders):
            log.warning("tokenize: an encoder cannot be started (%s)", str(error).strip().split("\n")[-1])
            await asyncio.sleep(min(_LONGEST_PAUSE_SECONDS, 2.0**self._failed_starts))
            return
        assert isinstance(error, Exception)
        self._break(error)

    def _break(self, error: Exception) -> None:
        """Fail all calls, those to come too."""
        self._broken = error
        while not self._line.empty():
            self._line.get_nowait().codes.set_exception(error)

    def _take_back(self, one: _Encoder, error: BaseException) -> None:
        """The calls of an encoder that died wait again; that on which it worked fails when too many died with it."""
        for position, call in enumerate(one.calls):
            call.crashes += position == 0
            if call.crashes < _CALL_CRASHES:
                self._line.put_nowait(call)
            elif not call.codes.done():
                call.codes.set_exception(_killing(call, error))

    async def _taking(self, one: _Encoder) -> None:
        while True:
            call = await self._line.get()
            one.calls.append(call)
            try:
                codes = await one.actor.encode.remote(call.frames)
            except RayActorError:
                raise
            except Exception as error:  # of encoding; or the caller died, and its frames with it
                call.codes.set_exception(error)
            else:
                call.codes.set_result(codes)
            one.calls.remove(call)
            one.last = asyncio.get_running_loop().time()


def _killing(call: _Call, error: BaseException) -> UserError:
    """Of a call with which one encoder after another died."""
    return UserError(
        f"tokenize: {call.crashes} encoders died one after another with the same frames of {call.media} "
        f"({_first_line(error)}); look for the reason in Ray's worker logs, give each encoder more memory or leave "
        f"these media out, and run the same command again"
    )


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
