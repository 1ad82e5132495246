"""One driver per output folder: a lease file with a heartbeat.

A second driver is refused while the first lives. A lease whose heartbeat stopped, or whose process on this host is
gone, is taken over, so that a killed run can be started again at once. A driver that was but stopped (a suspended
process or machine, a network that was away) finds on its return that the lease is another's, and ends: its heartbeat
replaces only the lease that it last wrote, and what it hands out to write with is fenced, so that neither it nor a task
of its commits anything more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from storage.errors import UserError
from storage.store import Store
from storage.urls import first_contact

LEASE = "lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
INTERRUPT_SIGNAL = signal.SIGUSR1
"""Not SIGINT, which a script's background jobs ignore and Ray Train handles in its own way."""
INTERRUPT_SECONDS = 15.0
"""Between two attempts to end a driver that has lost its lease; what it has to close takes less."""
FENCE_SECONDS = 1.0
"""How old an answer may be that the lease is still one's own."""

_ACQUIRE_ATTEMPTS = 20
_FIELDS = {"owner", "host", "pid", "started", "beat"}
_CONFIRMED: dict[str, float] = {}  # by owner: when this process last saw that it holds the lease


@dataclass(frozen=True)
class Fence:
    """Raises UserError where the lease of `store` is no longer `owner`'s. Travels to tasks and workers.

    max_age: seconds for which an answer of the store counts.
    """

    store: Store
    owner: str
    max_age: float = FENCE_SECONDS

    def __call__(self) -> None:
        """Ask, unless the last answer is young."""
        asked = time.monotonic()
        if asked - _CONFIRMED.get(self.owner, -math.inf) < self.max_age:
            return
        holder = self._holder()
        if holder.get("owner") != self.owner:
            raise lost(self.store, holder)
        _CONFIRMED[self.owner] = asked

    def _holder(self) -> dict[str, Any]:
        """What the lease says. A network disk may not find for a moment what a heartbeat replaces all the time."""
        for seconds in (0.1, 0.5):
            try:
                if holder := holder_of(self.store.read_bytes(LEASE)):
                    return holder
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            time.sleep(seconds)
        return holder_of(self.store.read_bytes(LEASE))


@contextlib.contextmanager
def lease(store: Store) -> Iterator[Store]:
    """Hold the folder for the length of the block, which gets the store fenced.

    Raises UserError when another living driver holds it, when nothing can be written there, or in the block, in the
    main thread, when another driver has taken it over.
    """
    held = _Heartbeat(store)
    is_new = store.is_local and not os.path.isdir(store.path())
    try:
        with first_contact(store.path()):
            held.acquire()
    except FileNotFoundError as error:
        raise UserError(f"{store.path()}: no such place ({error}); create the bucket or mend storage.root") from None
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(INTERRUPT_SIGNAL, signal.default_int_handler) if in_main else None
    heart = threading.Thread(target=held.beat, name="lease-heartbeat", daemon=True)
    heart.start()
    try:
        yield dataclasses.replace(store, fence=Fence(store, held.owner, FENCE_SECONDS))
    except BaseException:  # the signal is a KeyboardInterrupt
        if held.taken_over:
            raise held.taken_over from None
        raise
    finally:
        held.ended.set()
        heart.join()
        if in_main:
            signal.signal(INTERRUPT_SIGNAL, handler)
        with contextlib.suppress(OSError, UserError):  # the store is away: the lease ends by itself
            store.replace_json(LEASE, held.written, None)
            if is_new:
                os.rmdir(store.path())  # which fails where something has been written


class _Heartbeat:
    """A driver's hold on a folder. written: the lease as it last wrote it."""

    def __init__(self, store: Store) -> None:
        self.store, self.owner = store, uuid.uuid4().hex
        self._me = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        self._thread = threading.current_thread()
        self.written = self._now()
        self.ended = threading.Event()
        self.taken_over: UserError | None = None

    def _now(self) -> dict[str, Any]:
        return {**self._me, "beat": time.time()}

    def acquire(self) -> None:
        """Take the lease, or raise UserError that names its holder."""
        for _ in range(_ACQUIRE_ATTEMPTS):
            self.written = self._now()
            if self.store.create_json(LEASE, self.written):
                return
            data = self.store.read_bytes(LEASE)
            if data is None:  # let go of just now
                continue
            holder = holder_of(data)
            if holder.get("owner") == self.owner:  # it was created, and the answer lost
                return
            self._check_dead(holder)
            if self.store.replace_json(LEASE, data, self.written):
                return
        raise UserError(f"{self.store.path(LEASE)}: other drivers take this lease by turns; stop them and run again")

    def _check_dead(self, holder: dict[str, Any]) -> None:
        """Raise UserError where the lease's holder lives, or may live."""
        if holder and not _is_dead(holder):
            raise UserError(
                f"{self.store.path()}: another driver (pid {holder['pid']} on {holder['host']}) writes here; wait "
                f"for it, stop it, or give this run its own storage.root"
            )
        if not holder and (age := self._age()) < STALE_SECONDS:
            raise UserError(
                f"{self.store.path(LEASE)}: this file does not say which driver writes here (it is empty or damaged), "
                f"and was written {age:.0f} s ago; if no driver runs, delete it, or run again in {STALE_SECONDS:.0f} s"
            )

    def _age(self) -> float:
        try:
            return self.store.age(LEASE)
        except (FileNotFoundError, NotImplementedError):  # just gone; or nobody knows: wait for the user's word
            return 0.0

    def beat(self) -> None:
        """Renew the lease until the block ends; end the block when the lease is another's."""
        while not self.ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(
                OSError, UserError
            ):  # the store is away; whether the lease outlives that, it tells
                now = self._now()
                if self.store.replace_json(LEASE, self.written, now):
                    self.written = now
                    continue
                holder = holder_of(self.store.read_bytes(LEASE))
                if holder.get("owner") == self.owner:  # it was replaced, and the answer lost
                    self.written = holder
                    continue
                self.taken_over = lost(self.store, holder)
                self._interrupt()
                return

    def _interrupt(self) -> None:
        """End the block, if it runs in the main thread, which alone can be interrupted."""
        while self._thread is threading.main_thread() and not self.ended.is_set():
            signal.pthread_kill(self._thread.ident or 0, INTERRUPT_SIGNAL)
            # A signal that comes just as the thread begins to wait is seen only when the wait is over.
            self.ended.wait(INTERRUPT_SECONDS)


def holder_of(data: bytes | None) -> dict[str, Any]:
    """What a lease says of its holder; nothing where there is no lease, or it is not what a driver writes."""
    try:
        holder = json.loads(data or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and holder.keys() >= _FIELDS else {}


def lost(store: Store, holder: dict[str, Any]) -> UserError:
    """What a driver says that finds another in its place."""
    by = f"is now that of pid {holder['pid']} on {holder['host']}" if holder else "is gone: another driver has had it"
    return UserError(
        f"{store.path()}: this driver did not renew its lease for over {STALE_SECONDS:.0f} s, and the lease {by}; this "
        f"one writes nothing more and ends"
    )


def _is_dead(holder: dict[str, Any]) -> bool:
    if time.time() - holder["beat"] > STALE_SECONDS:
        return True
    if holder["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True
