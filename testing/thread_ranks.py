"""A group of ranks as threads of one process, on the CPU or on one card, which exchange tensors in memory.

In: a function of an exchange. Out: its results by rank, and every message. On a card all ranks work in the device's one
default stream, so what a rank enqueues after a message came runs after what made the message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

TIMEOUT = 60
"""Seconds that a rank waits for a message."""


class Mailbox:
    """Messages from one rank to another: the i-th receive posted gets the i-th tensor sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: list[Future[Tensor]] = []
        self._failure: Exception | None = None
        self.sent = self.received = 0

    def slot(self, number: int) -> Future[Tensor]:
        """Where the message of this number is put, and taken from."""
        with self._lock:
            while len(self._slots) <= number:
                self._slots.append(Future())
                self._end_waiting()
            return self._slots[number]

    def send(self, tensor: Tensor) -> None:
        """Put the next message, unless a rank has failed."""
        slot = self.slot(self.sent)
        with self._lock:
            if not slot.done():
                slot.set_result(tensor)
        self.sent += 1

    def fail(self, error: Exception) -> None:
        """Raise `error` where a message is waited for that has not been sent, now or later."""
        with self._lock:
            self._failure = error
            self._end_waiting()

    def _end_waiting(self) -> None:
        for slot in self._slots:
            if self._failure is not None and not slot.done():
                slot.set_exception(self._failure)


class ThreadExchange:
    """An exchange between threads. A send posts a copy, so no order of ranks is hidden by luck."""

    def __init__(self, rank: int, size: int, boxes: Mapping[tuple[int, int], Mailbox], log: list) -> None:
        self.rank, self.size, self._boxes, self._log = rank, size, boxes, log

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> _ThreadTransfer:
        """As `model.attention.p2p.Exchange`; a tensor that a process group would refuse is refused."""
        for peer, tensor in sends.items():
            assert peer != self.rank
            assert tensor.is_contiguous()
            assert tensor.numel()
            self._log.append((self.rank, peer, tensor.shape[0]))
            self._boxes[self.rank, peer].send(tensor.clone())
        waits = []
        for peer, tensor in receives.items():
            box = self._boxes[peer, self.rank]
            waits.append((box.slot(box.received), tensor))
            box.received += 1
        return _ThreadTransfer(waits)


class _ThreadTransfer:
    def __init__(self, waits: list[tuple[Future[Tensor], Tensor]]) -> None:
        self._waits = waits

    def wait(self) -> None:
        for sent, target in self._waits:
            tensor = sent.result(timeout=TIMEOUT)
            assert tensor.shape == target.shape
            target.copy_(tensor)
        self._waits = []


def run_in_threads(fn: Callable[[ThreadExchange], Any], size: int) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """`fn(exchange)` on every rank at once: the results by rank, and all messages as (from, to, keys).

    Raises what one of them raises, for which the others do not wait.
    """
    boxes = {(a, b): Mailbox() for a in range(size) for b in range(size)}
    log: list[tuple[int, int, int]] = []

    def rank_of(rank: int) -> Any:
        try:
            return fn(ThreadExchange(rank, size, boxes, log))
        except Exception as error:
            for box in boxes.values():
                box.fail(error)
            raise

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank_of, range(size)))
    assert all(box.sent == box.received for box in boxes.values()), "a message was sent that nobody took"
    return results, log
