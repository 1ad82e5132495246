"""One driver per output folder: a lease file with a heartbeat.

A second driver is refused while the first lives. A lease whose heartbeat stopped, or whose process on this host is
gone, is taken over, so that a killed run can be started again at once. A driver that was only paused (a suspended
process or machine, a lost network) finds on its return that another driver has the lease, and ends: its heartbeat
replaces only the lease that it wrote last, and the store that it and its tasks write to has a fence, so that none of
them commits anything more.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass, replace
from typing import Any

import psutil

from storage.errors import UserError
from storage.store import Store
from storage.urls import first_contact

LEASE = "lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
FENCE_SECONDS = 1.0

_INTERRUPT_SIGNAL = signal.SIGUSR1  # not SIGINT: background jobs of a script ignore it, Ray Train handles it otherwise
_INTERRUPT_SECONDS = 15.0  # between two signals to a driver that has lost its lease; closing takes less
_ACQUIRE_ATTEMPTS = 20
_FIELDS = {"owner", "host", "pid", "started", "beat"}
_CONFIRMED: dict[str, float] = {}  # by owner: when this process last saw the owner in the lease


@dataclass(frozen=True)
class Fence:
    """Raises UserError where the lease of `store` is no longer `owner`'s. Is sent to tasks and workers."""

    store: Store
    owner: str
    max_age: float = FENCE_SECONDS  # seconds for which a look at the lease counts

    def __call__(self) -> None:
        """Read the lease, unless it was read within `max_age`."""
        now = time.monotonic()
        if now - _CONFIRMED.get(self.owner, -math.inf) < self.max_age:
            return
        holder = self._holder()
        if holder.get("owner") != self.owner:
            raise _lost(self.store, holder)
        _CONFIRMED[self.owner] = now

    def _holder(self) -> dict[str, Any]:
        """The lease's holder. On a network disk a file that is often replaced may be missing for a moment."""
        for seconds in (0.1, 0.5):
            try:
                if holder := _parse_holder(self.store.read_bytes(LEASE)):
                    return holder
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            time.sleep(seconds)
        return _parse_holder(self.store.read_bytes(LEASE))


@contextlib.contextmanager
def lease(store: Store) -> Iterator[Store]:
    """Hold the lease of a folder during the block, which gets the store with a fence.

    Raises UserError where another living driver has the lease or nothing can be written there; in the block, in the
    main thread, where another driver has taken it over.
    """
    heartbeat = _Heartbeat(store)
    is_new = store.is_local and not os.path.isdir(store.path())
    try:
        with first_contact(store.path()):
            heartbeat.acquire()
    except FileNotFoundError as error:
        raise UserError(f"{store.path()}: no such place ({error}); create the bucket or mend storage.root") from None
    handler = signal.signal(_INTERRUPT_SIGNAL, signal.default_int_handler) if heartbeat.in_main else None
    thread = threading.Thread(target=heartbeat.run, name="lease-heartbeat", daemon=True)
    thread.start()
    try:
        yield replace(store, fence=Fence(store, heartbeat.owner, FENCE_SECONDS))
    except BaseException:  # the signal raises KeyboardInterrupt
        if heartbeat.taken_over:
            raise heartbeat.taken_over from None
        raise
    finally:
        heartbeat.ended.set()
        thread.join()
        if heartbeat.in_main:
            signal.signal(_INTERRUPT_SIGNAL, handler)
        with contextlib.suppress(OSError, UserError):  # the store does not answer: the lease goes stale by itself
            store.replace_json(LEASE, heartbeat.written, None)
            if is_new:
                os.rmdir(store.path())  # fails where something has been written


class _Heartbeat:
    """A driver's lease. written: its content as this driver last wrote it."""

    def __init__(self, store: Store) -> None:
        self.store, self.owner = store, uuid.uuid4().hex
        self.in_main = threading.current_thread() is threading.main_thread()
        self.ended = threading.Event()
        self.taken_over: UserError | None = None
        self.written = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }

    def acquire(self) -> None:
        """Take the lease, or raise UserError that names its holder."""
        for attempt in range(_ACQUIRE_ATTEMPTS):
            self.written = {**self.written, "beat": time.time()}
            try:
                if self.store.create_json(LEASE, self.written):
                    return
            except FileNotFoundError:
                if not self.store.is_local or attempt == _ACQUIRE_ATTEMPTS - 1:
                    raise
                continue  # another driver was refused and removed the folder that it had made
            data = self.store.read_bytes(LEASE)
            if data is None:  # released in between
                continue
            holder = _parse_holder(data)
            if holder.get("owner") == self.owner:  # created by a request whose answer was lost
                return
            self._check_dead(holder)
            if self.store.replace_json(LEASE, data, self.written):
                return
        raise UserError(f"{self.store.path(LEASE)}: other drivers take this lease by turns; stop them and run again")

    def run(self) -> None:
        """Renew the lease until the block ends; end the block when another driver has the lease."""
        while not self.ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, UserError):  # the store does not answer; a later beat finds out the rest
                renewed = {**self.written, "beat": time.time()}
                if self.store.replace_json(LEASE, self.written, renewed):
                    self.written = renewed
                    continue
                holder = _parse_holder(self.store.read_bytes(LEASE))
                if holder.get("owner") == self.owner:  # replaced by a request whose answer was lost
                    self.written = holder
                    continue
                self.taken_over = _lost(self.store, holder)
                self._interrupt()
                return

    def _check_dead(self, holder: dict[str, Any]) -> None:
        """Raise UserError where the lease's holder lives, or may live."""
        if holder:
            if _is_dead(holder):
                return
            raise UserError(
                f"{self.store.path()}: another driver (pid {holder['pid']} on {holder['host']}) writes here; wait "
                f"for it, stop it, or give this run its own storage.root"
            )
        try:
            age = self.store.age(LEASE)
        except (FileNotFoundError, NotImplementedError):  # just removed, or the file system has no times
            age = 0.0
        if age < STALE_SECONDS:
            raise UserError(
                f"{self.store.path(LEASE)}: this file does not say which driver writes here (it is empty or damaged), "
                f"and was written {age:.0f} s ago; if no driver runs, delete it, or run again in {STALE_SECONDS:.0f} s"
            )

    def _interrupt(self) -> None:
        """End the block where it runs in the main thread, the only one that can be interrupted."""
        while self.in_main and not self.ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT_SIGNAL)
            # A thread that is about to wait handles the signal only after its wait, so it is sent again.
            self.ended.wait(_INTERRUPT_SECONDS)


def _parse_holder(data: bytes | None) -> dict[str, Any]:
    """The holder that a lease names; empty where there is no lease, or none that a driver wrote."""
    try:
        holder = json.loads(data or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and holder.keys() >= _FIELDS else {}


def _lost(store: Store, holder: dict[str, Any]) -> UserError:
    """The error of a driver that has lost its lease."""
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
