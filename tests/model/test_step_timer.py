"""model/step_timer.py and model/attention/p2p.py: seconds by part, and waits for other ranks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from model.attention.p2p import TimedExchange, Transfer
from model.step_timer import StepClock


class Time:
    """Time that passes only where somebody sleeps."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("model.step_timer.time", time)
    return time


def test_parts_add_up_until_they_are_read(time: Time) -> None:
    clock = StepClock()
    for seconds in (1, 2):
        with clock.part("forward"):
            time.sleep(seconds)
        with clock.part("backward"):
            time.sleep(10 * seconds)
            with clock.part("communication"):
                time.sleep(seconds / 4)
    assert clock.read() == {"forward": 3, "backward": 30.75, "communication": 0.75}
    assert clock.read() == {}


class Slow:
    """An exchange whose messages take five seconds to wait for."""

    rank, size = 1, 2

    def __init__(self, time: Time) -> None:
        self.time, self.asked = time, []

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        self.asked.append((sends, receives))
        return self

    def wait(self) -> None:
        self.time.sleep(5)


def test_waiting_for_other_ranks_is_communication_and_what_is_computed_meanwhile_is_not(time: Time) -> None:
    clock, slow = StepClock(), Slow(time)
    exchange = TimedExchange(slow, clock)
    assert (exchange.rank, exchange.size) == (1, 2)
    message = torch.zeros(3)
    transfer = exchange.start({0: message}, {})
    time.sleep(3)
    transfer.wait()
    assert slow.asked == [({0: message}, {})]
    assert clock.read() == {"communication": 5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_device_is_timed_and_not_the_host() -> None:
    clock, a = StepClock("cuda"), torch.randn(4096, 4096, device="cuda")
    with clock.part("product"):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
    assert clock.read()["product"] > 20 * 2 * 4096**3 / 2e15
