"""How keys reach the ranks that need them, and gradients their owners: block after block, ahead of the compute.

In: a rank's own keys and values, its plan, an exchange. Out: an iterator over blocks of keys, its own first, the others
as the plan's stages bring them. Two stages are under way while a block is computed on, so a rank holds at most three
blocks of other ranks at any time. In a backward each block comes with a buffer for its gradients, which the next step
of the iterator sends to their owner. They are added in the plan's order, so results do not depend on timing. All ranks
post the same exchanges in the same order, so no two can wait for each other.

"direct": each rank gets exactly the ranges it needs from their owners. "relay": blocks go round the ring, their
gradients behind them (Ring Attention, arXiv 2310.01889), which spares the links between nodes under long documents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from model.attention.flash_kernels import add_rows_, rows_of
from model.attention.p2p import Exchange, Transfer
from model.attention.plan.runs import AHEAD, Message, RankPlan, Runs, Stage


class Block(NamedTuple):
    """Keys and values kv [N, 2, Hkv, D], a buffer dkv of the same shape for their gradients, and the runs over them."""

    kv: Tensor
    dkv: Tensor | None
    runs: Runs


def blocks(kv: Tensor, plan: RankPlan, exchange: Exchange, dkv: Tensor | None = None) -> Iterator[Block]:
    """All blocks of a forward; with dkv, of a backward. It must be exhausted: its last step finishes the exchange.

    kv: own keys and values [T, 2, Hkv, D]. dkv: of the same shape, in the accumulator dtype; it holds the gradients
    from all ranks once the iterator is exhausted.
    """
    return (_direct if plan.route == "direct" else _relay)(kv, plan, exchange, dkv)


def _direct(kv: Tensor, plan: RankPlan, exchange: Exchange, dkv: Tensor | None) -> Iterator[Block]:
    posted: deque[tuple[Transfer, Tensor]] = deque()
    later = iter(plan.stages)

    def post_next() -> None:
        if (stage := next(later, None)) is not None:
            received = kv.new_empty(stage.n_keys, *kv.shape[1:])
            sends = {message.peer: rows_of(kv, message.ranges) for message in stage.sends}
            posted.append((exchange.start(sends, _by_peer(received, stage.receives)), received))

    for _ in range(AHEAD):
        post_next()
    first, last = (plan.local, Runs()) if dkv is None else plan.backward_local
    yield Block(kv, dkv, first)
    finish: Callable[[], None] | None = None
    for stage in plan.stages:
        transfer, received = posted.popleft()
        transfer.wait()
        post_next()
        if dkv is None:
            yield Block(received, None, stage.runs)
        else:
            gradients = dkv.new_zeros(received.shape)
            yield Block(received, gradients, stage.runs)
            if finish is not None:
                finish()
            finish = _return_gradients(gradients, dkv, stage, exchange)
    if last:
        yield Block(kv, dkv, last)
    if finish is not None:
        finish()


def _return_gradients(gradients: Tensor, dkv: Tensor, stage: Stage, exchange: Exchange) -> Callable[[], None]:
    """Start sending the gradients of a stage's received keys to their owners; the result adds those of sent keys."""
    received = {m.peer: dkv.new_empty(m.n_keys, *dkv.shape[1:]) for m in stage.sends}
    transfer = exchange.start(_by_peer(gradients, stage.receives), received)

    def finish() -> None:
        transfer.wait()
        for message in stage.sends:
            add_rows_(dkv, message.ranges, received[message.peer])

    return finish


def _relay(kv: Tensor, plan: RankPlan, exchange: Exchange, dkv: Tensor | None) -> Iterator[Block]:
    if not plan.stages:
        yield Block(kv, dkv, plan.local)
        return
    offered = plan.stages[0].sends[0]

    def post(stage: Stage, block: Tensor) -> tuple[Transfer, Tensor]:
        received = kv.new_empty(stage.n_keys, *kv.shape[1:])
        return exchange.start(_by_peer(block, stage.sends), _by_peer(received, stage.receives)), received

    transfer, received = post(plan.stages[0], rows_of(kv, offered.ranges))
    first, last = (plan.local, Runs()) if dkv is None else plan.backward_local
    yield Block(kv, dkv, first)
    following = [*plan.stages[1:], None]
    under_way: tuple[Transfer, Tensor] | None = None  # the next block's gradients from the ranks before
    for stage, after in zip(plan.stages, following):
        transfer.wait()
        block = received
        if after is not None:
            transfer, received = post(after, block)
        if dkv is None:
            yield Block(block, None, stage.runs)
            continue
        gradients = dkv.new_zeros(block.shape)
        yield Block(block, gradients, stage.runs)
        if under_way is not None:
            under_way[0].wait()
            gradients += under_way[1]
        # Gradients follow their block to the next rank, after the last hop to the block's owner.
        from_behind = after.receives if after is not None else (offered._replace(peer=stage.receives[0].peer),)
        incoming = dkv.new_empty(from_behind[0].n_keys, *dkv.shape[1:])
        to_ahead = (stage.receives[0]._replace(peer=stage.sends[0].peer),)
        under_way = exchange.start(_by_peer(gradients, to_ahead), _by_peer(incoming, from_behind)), incoming
    if last:
        yield Block(kv, dkv, last)
    if dkv is not None and under_way is not None:
        under_way[0].wait()
        add_rows_(dkv, offered.ranges, under_way[1])


def _by_peer(joined: Tensor, messages: Sequence[Message]) -> dict[int, Tensor]:
    """The rows of a stage's messages, one after another in `joined`, by peer; without empty messages."""
    cut, begin = {}, 0
    for message in messages:
        if message.n_keys:
            cut[message.peer] = joined[begin : begin + message.n_keys]
        begin += message.n_keys
    return cut
