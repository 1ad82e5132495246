"""One rank of a ring, alone on a device: its part of a sequence, with other ranks' keys from the device's own memory.

In: a plan of a sequence, and a rank of its ring. Out: tensors and an exchange with which `packed_ring_attention` runs
forward and backward exactly as on that rank, but for the network; and the rows of the sequence that it meets, by which
its results are held against attention over the whole sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.attention.flash_kernels import accumulator_dtype, attend, attend_backward_
from model.attention.p2p import NoExchange, Transfer
from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention

DTYPE = torch.bfloat16
"""Of queries and keys, on a CPU too: gradients, in fp32, are told from keys by it."""


def ring_of(plan: SequencePlan) -> SequencePlan:
    """The plan of the ring alone: with a Ulysses degree u its ranks hold u times as many tokens, of 1 / u of the heads.

    Who holds and sends which keys is the same; Ulysses' own exchanges are left out.
    """
    return replace(plan, ulysses=1)


class StandIn:
    """An exchange that hands one rank the keys which the others would send; gradients for it are zeros.

    blocks: keys and values [N, 2, Hkv, D] of each stage that brings any, in order. returned: what the rank sends back
    for each of them, once it is a list.
    """

    def __init__(self, rank: int, size: int, blocks: Sequence[Tensor]) -> None:
        self.rank, self.size = rank, size
        self.returned: list[Tensor] | None = None
        self._blocks = itertools.cycle(blocks)

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Fill what is received at once."""
        if _are_keys(receives.values()):
            parts = next(self._blocks).split([len(x) for x in receives.values()])
            for received, part in zip(receives.values(), parts, strict=True):
                received.copy_(part)
        else:
            for received in receives.values():
                received.zero_()
            if self.returned is not None and sends and not _are_keys(sends.values()):
                self.returned.append(torch.cat(list(sends.values())))
        return _Done()


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


def _are_keys(tensors: Iterable[Tensor]) -> bool:
    return any(x.dtype == DTYPE for x in tensors)


class RankAlone:
    """A rank's random tensors, and its calls: `forward()` gives its rows of the output, `backward(out)` gradients."""

    def __init__(
        self, plan: SequencePlan, rank: int, heads: int, kv_heads: int, head_size: int, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(rank)

        def rows(n: int, *shape: int) -> Tensor:
            return torch.randn(n, *shape, head_size, generator=generator, device=device, dtype=DTYPE)

        self.plan, self.rank = plan, rank
        self.n_pairs = plan.rank(rank).n_pairs
        self._keys = rows(plan.n_tokens, 2, kv_heads)  # of the whole sequence
        self._grad = rows(plan.tokens_per_rank, heads)
        mine, *received = (torch.from_numpy(x).to(device) for x in (plan.indices(rank), *_received(plan, rank)))
        self._mine, self._received = mine, [x for x in received if len(x)]
        own = self._keys[mine]
        self.inputs = [
            x.contiguous().requires_grad_() for x in (rows(plan.tokens_per_rank, heads), own[:, 0], own[:, 1])
        ]
        self.exchange = StandIn(rank, plan.ring, [self._keys[x] for x in self._received])

    @property
    def n_keys(self) -> int:
        """Keys that it meets: its own and those received."""
        return len(self._mine) + sum(map(len, self._received))

    def forward(self) -> Tensor:
        """out [T, H, D], with its graph."""
        group = self.exchange if self.plan.sp > 1 else NoExchange()
        q, k, v = self.inputs
        return packed_ring_attention(q, k, v, self.plan, group)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of its q, k and v; the graph stays, so that it can be called again."""
        return torch.autograd.grad(out, self.inputs, self._grad, retain_graph=True)

    def difference(self) -> float:
        """The largest relative difference of out, dq, dk or dv to attention over the whole sequence in one block.

        Of the heads of one kv head, for all queries of the rank and all keys that it meets.
        """
        self.exchange.returned = []
        out = self.forward()
        dq, dk, dv = self.backward(out)
        out = out.detach()
        ours = torch.cat([torch.stack((dk, dv), 1).float(), *self.exchange.returned])
        self.exchange.returned = None
        heads = out.shape[1] // dk.shape[1]
        whole_out, whole_dq, whole_dkv = self._whole(heads)
        met = torch.cat([self._mine, *self._received])
        return max(
            relative_difference(out[:, :heads], whole_out[self._mine]),
            relative_difference(dq[:, :heads], whole_dq[self._mine]),
            *(relative_difference(ours[:, i, 0], whole_dkv[met, i, 0]) for i in range(2)),
        )

    @torch.no_grad()
    def _whole(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """out [S, heads, D], dq alike and dkv [S, 2, 1, D] of the whole sequence; others' queries have no gradient."""
        q, grad = (self._keys.new_zeros(len(self._keys), heads, self._keys.shape[-1]) for _ in range(2))
        q[self._mine], grad[self._mine] = self.inputs[0][:, :heads], self._grad[:, :heads]
        k, v = (self._keys[:, i, :1].contiguous() for i in range(2))
        runs = plan_sequence(self.plan.cu_seqlens, 1).rank(0).local
        out, lse = attend(q, k, v, runs)
        rounded = out.to(q.dtype)
        dq = torch.zeros_like(q, dtype=accumulator_dtype(q.dtype))
        dkv = dq.new_zeros(len(k), 2, 1, k.shape[-1])
        attend_backward_(dq, dkv[:, 0], dkv[:, 1], grad, q, k, v, rounded, lse, runs)
        return out, dq, dkv


def _received(plan: SequencePlan, rank: int) -> list[np.ndarray]:
    """int64 positions in the packed sequence of the keys that each stage brings to a rank of a ring, in order."""
    positions = []
    for hop, stage in enumerate(plan.rank(rank).stages, start=1):
        rows = [np.empty(0, np.int64)]
        for message in stage.receives:
            held = plan.indices(message.peer if plan.route == "direct" else (rank - hop) % plan.ring)
            rows += [held[start:end] for start, end in message.ranges]
        positions.append(np.concatenate(rows))
    return positions


def relative_difference(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact; infinite where x is not finite, so that a largest shows it."""
    relative = float((x.float() - exact.float()).norm() / exact.float().norm())
    return relative if relative == relative else float("inf")
