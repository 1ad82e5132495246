"""An exchange that counts how long its rank waits for the others.

In: another exchange and a clock. Out: the same messages, the waits for them counted as the clock's `communication`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model.attention.p2p import Exchange, Transfer
from model.step_timer import StepClock


class TimedExchange:
    """Its `communication` is what the compute did not hide; a transfer that is through already costs none."""

    def __init__(self, exchange: Exchange, clock: StepClock) -> None:
        self.rank, self.size = exchange.rank, exchange.size
        self._exchange, self._clock = exchange, clock

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """As the exchange below."""
        return _Timed(self._exchange.start(sends, receives), self._clock)


class _Timed:
    def __init__(self, transfer: Transfer, clock: StepClock) -> None:
        self._transfer, self._clock = transfer, clock

    def wait(self) -> None:
        with self._clock.part("communication"):
            self._transfer.wait()
