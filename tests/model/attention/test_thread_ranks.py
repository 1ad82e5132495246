"""Ranks as threads: messages arrive in the order in which they were sent, and none waits for a rank that has failed."""

from __future__ import annotations

import time

import pytest
import torch

from testing.thread_ranks import ThreadExchange, run_in_threads


def test_messages_between_two_ranks_keep_their_order() -> None:
    def both_ways(exchange: ThreadExchange) -> list[float]:
        peer, got = 1 - exchange.rank, [torch.zeros(1) for _ in range(3)]
        transfers = [exchange.start({}, {peer: x}) for x in got]
        for i in range(3):
            exchange.start({peer: torch.full((1,), 10.0 * exchange.rank + i)}, {})
        for transfer in reversed(transfers):
            transfer.wait()
        return [float(x) for x in got]

    results, log = run_in_threads(both_ways, 2)
    assert results == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]
    assert sorted(log) == [(0, 1, 1)] * 3 + [(1, 0, 1)] * 3


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_rank_that_fails_ends_those_that_wait_for_it(seconds: float) -> None:
    def fails_on_one(exchange: ThreadExchange) -> None:
        if exchange.rank == 1:
            time.sleep(seconds)
            raise ValueError("a plan that does not fit")
        exchange.start({}, {1: torch.zeros(1)}).wait()

    started = time.monotonic()
    with pytest.raises(ValueError, match="does not fit"):
        run_in_threads(fails_on_one, 4)
    assert time.monotonic() - started < 20
