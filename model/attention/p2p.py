"""Point-to-point exchange of tensors between the ranks of a group.

In: for each peer at most one tensor to send and one to fill. Out: a `Transfer` to wait on. Tensors between the same two
ranks arrive in the order in which they were sent. Callers depend on these two protocols only, so a group of threads, or
a slowed one, can stand in for a group of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from model.step_timer import StepClock


class Transfer(Protocol):
    """Sends and receives under way."""

    def wait(self) -> None:
        """Return once all receives are filled and all sent tensors may be reused."""


class Exchange(Protocol):
    """One rank's connection to the others."""

    rank: int
    size: int

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Begin to send and to fill contiguous tensors, by peer, and return at once."""


class GroupExchange:
    """Exchange over a torch process group: gloo for CPU tensors, NCCL for CUDA tensors.

    NCCL requires every rank in the first operation of a group, in which some ranks may exchange nothing here: the group
    must have been used for a collective before, as by `build_mesh`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Post all receives and sends in one batch before any is waited for, so that no order of ranks deadlocks."""
        # The process group takes peers as ranks of the whole world, and none may be the sender.
        ops = [
            dist.P2POp(operation, tensor, dist.get_global_rank(self.group, peer), self.group)
            for operation, tensors in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in tensors.items()
        ]
        return _Works(dist.batch_isend_irecv(ops) if ops else [])


class _Works:
    def __init__(self, works: list[dist.Work]) -> None:
        self._pending = works

    def wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending = []


class NoExchange:
    """The exchange of a single rank."""

    rank = 0
    size = 1

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Nothing to send."""
        return _Works([])


Group = dist.ProcessGroup | Exchange | None
"""The ranks that share a sequence: a process group, an exchange, or None for one rank."""


def as_exchange(group: Group) -> Exchange:
    """The exchange between the ranks of a group."""
    if group is None:
        return NoExchange()
    return GroupExchange(group) if isinstance(group, dist.ProcessGroup) else group


class TimedExchange:
    """Another exchange, whose waits count as the clock's `communication`: the transfers that compute did not hide."""

    def __init__(self, exchange: Exchange, clock: StepClock) -> None:
        self.rank, self.size = exchange.rank, exchange.size
        self._exchange, self._clock = exchange, clock

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """As the exchange below."""
        return _TimedTransfer(self._exchange.start(sends, receives), self._clock)


class _TimedTransfer:
    def __init__(self, transfer: Transfer, clock: StepClock) -> None:
        self._transfer, self._clock = transfer, clock

    def wait(self) -> None:
        with self._clock.part("communication"):
            self._transfer.wait()
