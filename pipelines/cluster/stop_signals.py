"""Signals that end a run in order: SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread.

Every block on the way out then closes what it opened: the group of workers, Ray, the lease. The signal is kept here,
since Ray turns every exception in a handler into KeyboardInterrupt. A signal that the process was started to ignore, as
by nohup, stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """The handlers of this process, which has one of each; `stop_signals` is the only instance."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first that came."""
        self._handlers: dict[signal.Signals, Any] = {}
        self._is_deferred = False
        self._is_closing = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """For the length of the block, which the main thread runs. Elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.received = None
        self._handlers = {n: signal.SIG_IGN if old is signal.SIG_IGN else self._handle for n, old in before.items()}
        self.install()
        try:
            yield
        finally:
            self._handlers = {}
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Put the handlers in place again, where Ray has put its own. Nothing outside of `handled`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The first SIGTERM interrupts at the end of the block, which finds it in `received`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
            if self.received is not None:
                raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Nothing interrupts the block, which closes what would be left behind."""
        self._is_closing = True
        try:
            yield
        finally:
            self._is_closing = False

    def interrupt(self) -> None:
        """Interrupt the main thread, from another one, after a signal that was deferred."""
        if self.received is not None:
            os.kill(os.getpid(), self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        if is_first:
            self.received = signal.Signals(number)
        if self._is_closing or (is_first and self._is_deferred and number == signal.SIGTERM):
            return
        raise KeyboardInterrupt


stop_signals = StopSignals()
