"""A signal interrupts the main thread, again and again where a library drops what the handler raises."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipelines.cluster import stop_signals as module
from pipelines.cluster.stop_signals import stop_signals


def wait(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_whose_interrupt_is_dropped_comes_again(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.1)
    drops = 0
    with pytest.raises(KeyboardInterrupt), stop_signals.handled():
        os.kill(os.getpid(), number)
        while drops < 3:
            try:
                wait(30)
            except KeyboardInterrupt:
                drops += 1
        wait(30)
    assert stop_signals.received == number
    wait(0.3)  # nothing comes when the block is left


def test_what_is_being_closed_is_not_interrupted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.05)
    with stop_signals.handled():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            wait(30)
        except KeyboardInterrupt:
            with stop_signals.held_back():
                wait(0.3)
    assert stop_signals.received == signal.SIGTERM
