"""A pool of encoder actors that grows with its queue: calls wait in one line, and whichever encoder is free takes the
next.

In: how to make an encoder, how many there are at least and at most. Out: one actor with `encode`, for any number of
callers. Encoders are added while calls wait longer than they should and taken away when they have had nothing to do.
One that dies is replaced and its calls are made again by others, so a call fails only if encoding itself fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from pipelines.cluster import own_errors
from pipelines.progress import Meter

log = logging.getLogger("ringworld")

_CALLS_UNDER_WAY = 2  # of an encoder: one runs, and the frames of the next are on their way to it
_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 1.0  # a call that waits longer wants one more encoder
_FAILED_STARTS = 5  # in a row, before the pool gives up


@dataclass(frozen=True)
class PoolSize:
    """How many encoders there are at least and at most, and how long one may idle before it goes, in seconds."""

    least: int
    most: int
    idle_seconds: float = 60.0


@contextlib.contextmanager
def encoder_pool(encoder: Any, arguments: tuple[Any, ...], size: PoolSize) -> Iterator[Any]:
    """A pool for the length of the block: the handle of an `_EncoderPool`."""
    pool = _EncoderPool.remote(encoder, arguments, size)  # type: ignore[attr-defined]
    try:
        yield pool
    finally:
        with contextlib.suppress(RayError):
            ray.get(pool.close.remote(), timeout=10)
        ray.kill(pool)


def wait_until_ready(pool: Any) -> int:
    """Wait until a pool has its least number of encoders, and say how many it has. Raises what their `load` raised."""
    with own_errors():
        count: int = ray.get(pool.ready.remote())
    return count


@dataclass(eq=False)
class _Call:
    frames: ray.ObjectRef
    since: float
    codes: asyncio.Future[Any]


@dataclass(eq=False)
class _Encoder:
    """One actor of the pool. calls: that it has now. last: when it last had one. started: whether it is ready."""

    actor: Any
    last: float
    calls: int = 0
    started: bool = False
    task: asyncio.Task[None] | None = None


class _Line:
    """Calls that no encoder has yet, the oldest first."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque()
        self._count = asyncio.Semaphore(0)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def oldest(self) -> _Call | None:
        return self._calls[0] if self._calls else None

    def join(self, call: _Call, *, first: bool = False) -> None:
        (self._calls.appendleft if first else self._calls.append)(call)
        self._count.release()

    async def next(self) -> _Call:
        await self._count.acquire()
        return self._calls.popleft()


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _EncoderPool:
    """The pool. It holds no state that cannot be lost: restarted, it starts encoders anew and Ray repeats the calls.

    encoder: an actor class with its options; its actors have `load()`, which makes them ready, and `encode(frames)`.
    arguments: of its constructor.
    """

    def __init__(self, encoder: Any, arguments: tuple[Any, ...], size: PoolSize) -> None:
        self._make = lambda: encoder.remote(*arguments)
        self._size = size
        self._line = _Line()
        self._encoders: list[_Encoder] = []
        self._failed_starts = 0
        self._broken: Exception | None = None
        self._watch: asyncio.Task[None] | None = None
        self._meter = Meter("tokenize")

    async def encode(self, frames: list[ray.ObjectRef]) -> Any:
        """What an encoder returns for the frames behind the one reference in the list; raises what it raises."""
        self._start()
        loop = asyncio.get_running_loop()
        call = _Call(frames[0], loop.time(), loop.create_future())
        self._line.join(call)
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
            self._meter.set(encoders=len(self._encoders) - starting, encoder_queue=len(self._line))
            self._add(self._size.least - len(self._encoders))
            oldest = self._line.oldest
            if oldest and now - oldest.since > _PATIENCE_SECONDS and not starting:
                self._add(min(1 + len(self._encoders) // 2, self._size.most - len(self._encoders)))
            idle = [one for one in self._encoders if not one.calls and now - one.last > self._size.idle_seconds]
            idle.sort(key=lambda one: one.started)  # first those that find no room in the cluster
            for one in idle[: max(0, len(self._encoders) - self._size.least)]:
                self._end(one)

    def _add(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(count):
            one = _Encoder(self._make(), loop.time())
            self._encoders.append(one)
            one.task = loop.create_task(self._serving(one))

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
            said = str(errors.exceptions[0]).split("\n")[0]
            log.warning("tokenize: an encoder died (%s); another takes its place", said)
            self._failed_starts += not one.started
            if self._failed_starts >= _FAILED_STARTS:
                self._break(errors.exceptions[0])
        except* Exception as errors:  # raised by load(): there are no weights, or not those of the recipe
            self._break(errors.exceptions[0])
        if one in self._encoders:
            one.task = None
            self._end(one)

    async def _taking(self, one: _Encoder) -> None:
        while True:
            call = await self._line.next()
            one.calls += 1
            try:
                codes = await one.actor.encode.remote(call.frames)
            except (RayActorError, asyncio.CancelledError):
                self._line.join(call, first=True)
                raise
            except Exception as error:  # of encoding; or the caller died, and its frames with it
                call.codes.set_exception(error)
            else:
                call.codes.set_result(codes)
            finally:
                one.calls -= 1
                one.last = asyncio.get_running_loop().time()

    def _break(self, error: BaseException) -> None:
        """Fail all calls, and those to come: no encoder can be had."""
        assert isinstance(error, Exception)
        self._broken = error
        while self._line.oldest is not None:
            self._line._calls.popleft().codes.set_exception(error)
