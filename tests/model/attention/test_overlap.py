"""Communication hides behind compute: time is counted on a clock of its own, so that the test waits for nobody.

Each rank's clock moves by the pairs its kernel calls compute; a message arrives a fixed delay after it was sent, and
whoever waits for it moves on to that moment.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import ring
from model.attention.p2p import Transfer
from model.attention.plan.options import Route
from model.attention.plan.planner import LAYOUTS
from model.attention.plan.sequence_plan import SequencePlan
from testing.dense_attention import random_tensors
from testing.packed_attention import forward_backward
from testing.thread_ranks import ThreadExchange, run_in_threads

BACKWARD = 2.5
"""What a pair costs in the backward, in forwards."""


class Clocked:
    """An exchange whose messages take `delay`; `time` is this rank's clock, `delayed` the sum of all delays met."""

    def __init__(self, exchange: ThreadExchange, sent_at: dict, delay: float) -> None:
        self.exchange, self.sent_at, self.delay = exchange, sent_at, delay
        self.rank, self.size = exchange.rank, exchange.size
        self.time = self.delayed = 0.0
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        for peer in sends:
            self.sent_at[self.rank, peer, self.sent[peer]] = self.time
            self.sent[peer] += 1
        expected = [(peer, self.rank, self.received[peer]) for peer in receives]
        self.received.update(receives.keys())
        self.delayed += self.delay if expected else 0
        return _Arrival(self, self.exchange.start(sends, receives), expected)


class _Arrival:
    def __init__(self, clocked: Clocked, transfer: Transfer, expected: list) -> None:
        self.clocked, self.transfer, self.expected = clocked, transfer, expected

    def wait(self) -> None:
        self.transfer.wait()
        arrivals = [self.clocked.sent_at[message] + self.clocked.delay for message in self.expected]
        self.clocked.time = max([self.clocked.time, *arrivals])


@contextmanager
def kernels_on_the_clock(monkeypatch: pytest.MonkeyPatch, here: threading.local) -> Iterator[None]:
    def counting(kernel: Any, cost: float) -> Any:
        def call(*args: Any) -> Any:
            runs = next(a for a in args if isinstance(a, tuple) and not isinstance(a, Tensor))
            here.clock.time += cost * sum(run.n_pairs for run in runs)
            return kernel(*args)

        return call

    with monkeypatch.context() as patch:
        for name, cost in (("attend", 1.0), ("attend_", 1.0), ("attend_backward_", BACKWARD)):
            patch.setattr(ring, name, counting(getattr(ring, name), cost))
        yield


def step_time(plan: SequencePlan, delay: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Time of the slowest rank for one forward and backward, and the delays it would have met one by one."""
    tensors = random_tensors(plan.n_tokens, 2, 2, 8, torch.float32)
    here, sent_at = threading.local(), {}

    def run(exchange: ThreadExchange) -> tuple[float, float]:
        here.clock = clock = Clocked(exchange, sent_at, delay)
        forward_backward(tensors, plan, clock, clock.rank)
        return clock.time, clock.delayed

    with kernels_on_the_clock(monkeypatch, here):
        by_rank, _ = run_in_threads(run, plan.sp)
    return max(time for time, _ in by_rank), max(delayed for _, delayed in by_rank)


@pytest.mark.parametrize(("layout", "route"), [("zigzag", "direct"), ("zigzag", "relay"), ("shared-0.5%", "direct")])
@pytest.mark.parametrize("boundaries", [[0, 1024], [0, 700, 900, 1024]])
def test_a_slow_exchange_costs_less_than_half_of_its_delays_while_they_fit_behind_compute(
    boundaries: list[int], layout: str, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens = np.array(boundaries)
    plan = SequencePlan(cu_seqlens, LAYOUTS[layout](cu_seqlens, 8), 8, 1, route)
    quick, _ = step_time(plan, 0.0, monkeypatch)
    stages = max(1, len(plan.rank(0).stages))
    delay = quick / (3 * stages) / 2  # three exchanges a stage: all of them together take half of the compute
    slow, delayed = step_time(plan, delay, monkeypatch)
    assert delayed > 0.2 * quick
    assert slow - quick < 0.5 * delayed


def test_without_anything_to_compute_on_a_delay_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    cu_seqlens = np.array([0, 64])
    plan = SequencePlan(cu_seqlens, LAYOUTS["zigzag"](cu_seqlens, 2), 2)
    quick, _ = step_time(plan, 0.0, monkeypatch)
    slow, _ = step_time(plan, 1e6, monkeypatch)
    assert slow - quick > 1e6
