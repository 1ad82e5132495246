"""One driver per output folder: a lease file with a heartbeat.

A second driver is refused while the first lives. A lease whose heartbeat stopped, or whose process on this host is
gone, is taken over, so that a killed run can be started again at once. A driver that was only paused (a suspended
process or machine, a lost network) finds on its return that another driver has the lease, and ends: its heartbeat
replaces only the lease that it wrote last, and the store that it and its tasks write to has a fence, so that none of
them commits anything more.

Whether a heartbeat stopped is judged by the clock that holder and asker share, or, where they share none, by watching
for some seconds whether the lease changes. On a store that ignores the conditions of a put, a lease counts when it is
still there some seconds after it was written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from storage.errors import UserError
from storage.process_identity import ProcessIdentity, seconds_since_boot
from storage.store import Store
from storage.urls import first_contact

log = logging.getLogger("ringworld")

LEASE = "lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
FENCE_SECONDS = 1.0
WATCH_SECONDS = 12.5  # two beats and a half: a living driver renews its lease within them, whatever its clock says
SETTLE_SECONDS = 5.0  # on a store without conditional puts: drivers that ask at once have all written within these

_INTERRUPT_SIGNAL = signal.SIGUSR1  # not SIGINT: background jobs of a script ignore it, Ray Train handles it otherwise
_INTERRUPT_SECONDS = 15.0  # between two signals to a driver that has lost its lease; closing takes less
_ACQUIRE_ATTEMPTS = 20
_LATEST_BEAT = 1e11  # seconds since 1970, by any clock; what is not a number is not less
_LOG_SECONDS = 60.0  # between two lines about a lease that cannot be renewed
_FIELDS = {"owner": str, "host": str, "pid": int, "beat": int | float}
_CONFIRMED: dict[str, float] = {}  # by owner: when this process last saw the owner in the lease


@dataclass(frozen=True)
class Fence:
    """Raises UserError where the lease of `store` is no longer `owner`'s. Is sent to tasks and workers."""

    store: Store
    owner: str
    max_age: float = FENCE_SECONDS  # seconds for which a look at the lease counts

    def __call__(self) -> None:
        """Read the lease, unless it was read within `max_age`."""
        now = seconds_since_boot()
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
    store.check_output()
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
        self.written: dict[str, Any] = {"owner": self.owner, **asdict(ProcessIdentity.current())}
        self._is_conditional: bool | None = None  # whether the store honours conditions; None: it was not asked yet

    def acquire(self) -> None:
        """Take the lease, or raise UserError that names its holder."""
        for attempt in range(_ACQUIRE_ATTEMPTS):
            data, begun = self.store.read_bytes(LEASE), seconds_since_boot()
            holder = _parse_holder(data)
            if data is not None and holder.get("owner") != self.owner:  # own: created by a put whose answer was lost
                self._check_dead(holder, data)
                begun = seconds_since_boot()
            self.written = {**self.written, "beat": time.time()}
            try:
                is_written = (
                    self.store.create_json(LEASE, self.written)
                    if data is None
                    else self.store.replace_json(LEASE, data, self.written)
                )
            except FileNotFoundError:
                if not self.store.is_local or attempt == _ACQUIRE_ATTEMPTS - 1:
                    raise
                continue  # another driver was refused and removed the folder that it had made
            if is_written and self._is_settled(begun):
                return
        raise UserError(f"{self.store.path(LEASE)}: other drivers take this lease by turns; stop them and run again")

    def run(self) -> None:
        """Renew the lease until the block ends; end the block when another driver has the lease."""
        renewed, logged = seconds_since_boot(), -math.inf
        while not self.ended.wait(HEARTBEAT_SECONDS):
            try:
                if not self._renew():
                    self._interrupt()
                    return
                renewed = seconds_since_boot()
            except (OSError, UserError) as error:  # the store does not answer; a later beat finds out the rest
                now = seconds_since_boot()
                if now - logged >= _LOG_SECONDS:
                    logged = now
                    reason = " ".join(str(getattr(error, "reason", "") or error).split())
                    log.warning(
                        "%s: the lease could not be renewed for %.0f s (%s); trying on, but after %.0f s another "
                        "driver may take it over",
                        self.store.path(LEASE),
                        now - renewed,
                        reason,
                        STALE_SECONDS,
                    )

    def _renew(self) -> bool:
        """Whether the lease is still this driver's, which then has been renewed."""
        renewed = {**self.written, "beat": time.time()}
        if self.store.replace_json(LEASE, self.written, renewed):
            self.written = renewed
            return True
        holder = _parse_holder(self.store.read_bytes(LEASE))
        if holder.get("owner") == self.owner:  # replaced by a request whose answer was lost
            self.written = holder
            return True
        self.taken_over = _lost(self.store, holder)
        return False

    def _is_settled(self, begun: float) -> bool:
        """Whether the lease that was just written is this driver's for certain. begun: when it was last seen free."""
        if self._is_conditional is None:
            self._is_conditional = self.store.honours_conditions(LEASE, self.written)
            if not self._is_conditional:
                log.warning(
                    "%s: this store ignores the conditions of a put (If-None-Match, If-Match), so that two drivers are "
                    "kept apart only by reading the lease again after %.0f s; start one driver at a time",
                    self.store.path(),
                    SETTLE_SECONDS,
                )
        if self._is_conditional:
            return True
        if seconds_since_boot() - begun > SETTLE_SECONDS / 2:  # too slow for others, who wait no longer than that
            return False
        time.sleep(SETTLE_SECONDS)
        return _parse_holder(self.store.read_bytes(LEASE)).get("owner") == self.owner

    def _check_dead(self, holder: dict[str, Any], data: bytes) -> None:
        """Return where the lease's holder is dead, which may take a while to find out; else raise UserError."""
        seconds = self._watch_seconds(holder)
        if seconds == math.inf:
            raise self._refusal(holder)
        if seconds and (changed := self._changed(holder, data, seconds)) is not None:
            raise self._refusal(_parse_holder(changed))

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        """The error of a driver that finds another one's lease."""
        which = f" (pid {holder['pid']} on {holder['host']})" if holder else ""
        return UserError(
            f"{self.store.path()}: another driver{which} writes here; wait for it, stop it, or give this run its own "
            f"storage.root"
        )

    def _watch_seconds(self, holder: dict[str, Any]) -> float:
        """For how long a lease must stay as it is until its holder counts as dead: 0 if it does, inf if it lives."""
        if not holder:
            return self._watch_seconds_unreadable()
        other, here = _identity(holder), ProcessIdentity.current()
        if other.is_gone():
            return 0.0
        age = time.time() - holder["beat"]
        if age < -HEARTBEAT_SECONDS:  # by a clock that is ahead, or was
            return STALE_SECONDS
        if age <= STALE_SECONDS:
            return math.inf
        return 0.0 if other.shares_clock(here) else WATCH_SECONDS

    def _watch_seconds_unreadable(self) -> float:
        """The same for a lease that names no holder, which a living driver would not leave so: it has lost it."""
        try:
            age = self.store.age(LEASE)
        except (FileNotFoundError, NotImplementedError):  # just removed, or the file system has no times
            age = 0.0
        if age < -HEARTBEAT_SECONDS:  # by the clock of the store, which is ahead
            return STALE_SECONDS
        if age >= STALE_SECONDS:
            return 0.0
        raise UserError(
            f"{self.store.path(LEASE)}: this file does not say which driver writes here (it is empty or damaged), "
            f"and was written {age:.0f} s ago; if no driver runs, delete it, or run again in {STALE_SECONDS:.0f} s"
        )

    def _changed(self, holder: dict[str, Any], data: bytes, seconds: float) -> bytes | None:
        """The lease that is there in place of `data` before `seconds` are over by the clock of this machine."""
        whose = f"pid {holder['pid']} on {holder['host']}" if holder else "an unknown driver"
        log.info(
            "%s: this is the lease of %s, written by a clock that differs from this machine's; watching for %.0f s "
            "whether it is renewed",
            self.store.path(LEASE),
            whose,
            seconds,
        )
        deadline = seconds_since_boot() + seconds
        while (left := deadline - seconds_since_boot()) > 0:
            time.sleep(min(left, 1.0))
            if (now := self.store.read_bytes(LEASE)) != data:
                return now  # None: it was released
        return None

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
    is_whole = isinstance(holder, dict) and all(isinstance(holder.get(name), of) for name, of in _FIELDS.items())
    return holder if is_whole and abs(holder["beat"]) < _LATEST_BEAT else {}


def _identity(holder: dict[str, Any]) -> ProcessIdentity:
    """The holder's process, as far as its lease tells it."""
    known = asdict(ProcessIdentity("", 0))
    return ProcessIdentity(**{name: holder[name] for name, of in known.items() if type(holder.get(name)) is type(of)})


def _lost(store: Store, holder: dict[str, Any]) -> UserError:
    """The error of a driver that has lost its lease."""
    by = f"is now that of pid {holder['pid']} on {holder['host']}" if holder else "is gone: another driver has had it"
    return UserError(
        f"{store.path()}: this driver did not renew its lease for over {STALE_SECONDS:.0f} s, and the lease {by}; this "
        f"one writes nothing more and ends"
    )
