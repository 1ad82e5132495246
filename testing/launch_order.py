"""The order in which processes launch operations on their groups, and whether it is one order for all of them.

In: a process that trains, within `launches`. Out: what it launched, outermost calls alone, as plain tuples that can be
sent; and, of all processes together, whether they would end if each ran its operations strictly one after another, over
all of its groups. That is the worst that NCCL does on a GPU. gloo, which waits for nobody, would not show it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "broadcast", "broadcast_object_list", "barrier"),
)


class Launch(NamedTuple):
    """One operation. group: torch's name of it, the same on all ranks. ranks: of the world, that take part: for a
    collective all of the group. is_exchange: whether it is a batch of messages between them, which the others may lack.
    """

    group: str
    ranks: tuple[int, ...]
    is_exchange: bool


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Within it the list grows by what this process launches, through torch or DeepSpeed."""
    from deepspeed.comm.torch import TorchBackend

    seen: list[Launch] = []
    depth = 0

    def recorded(operation: Callable[..., Any], launch: Callable[..., Launch]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                seen.append(launch(*args, **kwargs))
            depth += 1
            try:
                return operation(*args, **kwargs)
            finally:
                depth -= 1

        return call

    with ExitStack() as stack:
        for owner in (dist, TorchBackend):
            for name in COLLECTIVES:
                if (operation := getattr(owner, name, None)) is not None:
                    stack.enter_context(mock.patch.object(owner, name, recorded(operation, _collective)))
        exchange = recorded(dist.batch_isend_irecv, _exchange)
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", exchange))
        yield seen


def _collective(*args: Any, **kwargs: Any) -> Launch:
    groups = [each for each in (*args, *kwargs.values()) if isinstance(each, dist.ProcessGroup)]
    group = groups[0] if groups else dist.group.WORLD
    assert group is not None
    return Launch(group.group_name, tuple(dist.get_process_group_ranks(group)), False)


def _exchange(operations: Sequence[dist.P2POp]) -> Launch:
    group = operations[0].group
    assert group is not None
    peers = {operation.peer for operation in operations}
    return Launch(group.group_name, tuple(sorted(peers | {dist.get_rank()})), True)


def left_waiting(of_ranks: Sequence[Sequence[Launch]]) -> dict[int, Launch]:
    """By rank, what it would wait at for ever if each ran its launches one after another; none where all end."""
    queues = [deque(launched) for launched in of_ranks]
    while met := _that_meet(queues):
        for rank in met:
            queues[rank].popleft()
    return {rank: queue[0] for rank, queue in enumerate(queues) if queue}


def _that_meet(queues: Sequence[deque[Launch]]) -> set[int]:
    """Ranks whose next launches are one and the same operation, with all that take part; none where there are none."""
    for rank in range(len(queues)):
        if (met := _with_its_peers(rank, queues)) is not None:
            return met
    return set()


def _with_its_peers(rank: int, queues: Sequence[deque[Launch]]) -> set[int] | None:
    met: set[int] = set()
    ahead = [rank]
    while ahead:
        one = ahead.pop()
        if not queues[one]:
            return None
        launch = queues[one][0]
        for peer in set(launch.ranks) - {one}:
            other = queues[peer][0] if queues[peer] else None
            if other is None or (other.group, other.is_exchange) != (launch.group, launch.is_exchange):
                return None
            if one not in other.ranks:
                return None
        met.add(one)
        ahead += [peer for peer in launch.ranks if peer not in met]
    return met
