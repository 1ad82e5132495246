"""An exchange that is slow on purpose, to show how much of its time the compute hides.

In: another exchange and the seconds that a byte shall take longer. Out: the same messages, later. What a rank receives
comes over one link, one exchange after the other, in the order in which they were begun.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from model.attention.p2p import Exchange, Transfer


class SlowExchange:
    """Counts what comes in, and lets it arrive late."""

    def __init__(self, exchange: Exchange, seconds_per_byte: float = 0.0) -> None:
        self.rank, self.size = exchange.rank, exchange.size
        self.seconds_per_byte = seconds_per_byte
        self.bytes_received = 0
        self.exchanges = 0
        """Those in which anything was received."""
        self._exchange = exchange
        self._link_free = 0.0

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """As the exchange below."""
        transfer = self._exchange.start(sends, receives)
        incoming = sum(tensor.nbytes for tensor in receives.values())
        self.bytes_received += incoming
        self.exchanges += incoming > 0
        if incoming:
            self._link_free = max(time.monotonic(), self._link_free) + incoming * self.seconds_per_byte
        return _Late(transfer, self._link_free if incoming else 0.0)


class _Late:
    def __init__(self, transfer: Transfer, arrival: float) -> None:
        self._transfer, self._arrival = transfer, arrival

    def wait(self) -> None:
        self._transfer.wait()
        time.sleep(max(0.0, self._arrival - time.monotonic()))
