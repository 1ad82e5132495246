"""Attention of new tokens over keys that stay on the ranks that made them.

In: queries, keys and values of new tokens of one layer, and the cache. Out: the attention's output. Three ways:

`ChunkAttention`, for many new tokens that the ranks share by a plan. Among themselves they attend by the ring: keys
travel. To what is stored from before, their queries travel instead, each rank attends to its own block, and what it
found goes back with its log-sum-exp (pass-Q of arXiv 2411.01783): the traffic is that of the new tokens, however
long the context is.

`StepAttention`, for one new token a row. Every rank has computed its query, so none travels: each rank attends to its
own block, all get all results, and merge them in the order of ranks, so that every rank goes on with the same bits.

`PeekAttention`, the same for several new tokens a row, which attend to each other too and are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention.block_exchange import blocks
from model.attention.flash_kernels import accumulator_dtype, attend, attend_, merge_, rows_of
from model.attention.p2p import Exchange
from model.attention.plan.runs import Range, RankPlan, Runs
from model.inference.gathering import Gathering, gather
from model.inference.kv_cache import Reads, Write, store


def attend_stored(q: Tensor, reads: Reads, layer: int, kv_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """The attention of q [T, H, D] over stored keys: out [T, H, D] and lse [T, H] in the accumulator dtype.

    Heads that share keys are queries side by side, so that each key is read once. A query without keys gets 0 and -inf.
    """
    heads_per_kv = q.shape[1] // kv_heads
    folded = q if heads_per_kv == 1 else q.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    parts = reads.parts
    if reads.complete:
        (slab, slots, runs), parts = parts[0], parts[1:]
        out, lse = attend(folded, *slab.read(layer, slots, q.dtype), runs, scale)
    else:
        dtype = accumulator_dtype(q.dtype)
        out, lse = torch.zeros_like(folded, dtype=dtype), folded.new_full(folded.shape[:2], -torch.inf, dtype=dtype)
    for slab, slots, runs in parts:
        attend_(out, lse, folded, *slab.read(layer, slots, q.dtype), runs, scale)
    if heads_per_kv == 1:
        return out, lse
    out, lse = (x.unflatten(0, (-1, heads_per_kv)).transpose(1, 2).flatten(1, 2) for x in (out, lse))
    return out, lse


@dataclass(frozen=True)
class StepAttention:
    """One new token a row, the same on every rank. writes: those that this rank keeps. reads: all it then has."""

    writes: Sequence[Write]
    reads: Reads
    exchange: Exchange
    scale: float

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `forward.Attention`."""
        store(self.writes, layer, k, v)
        out, lse = attend_stored(q, self.reads, layer, k.shape[1], self.scale)
        if self.exchange.size > 1:
            found = torch.cat((out, lse.unsqueeze(-1)), dim=-1)
            results = gather(found, [len(out)] * self.exchange.size, self.exchange)
            out = _merged(results.unflatten(0, (self.exchange.size, -1)))
        return out.to(q.dtype)


@dataclass(frozen=True)
class PeekAttention:
    """Several new tokens a row, the same on every rank, none of which is stored: some may never be.

    reads: how all of them meet this rank's older keys. own: the causal runs of each row's among themselves, which every
    rank computes. layers: by layer, their keys and values [T, Hkv, D], filled in here.
    """

    reads: Reads
    own: Runs
    exchange: Exchange
    scale: float
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `forward.Attention`."""
        self.layers.append((k, v))
        results = [attend_stored(q, self.reads, layer, k.shape[1], self.scale)]
        if self.exchange.size > 1:
            ((out, lse),) = results
            joined = torch.cat((out, lse.unsqueeze(-1)), dim=-1)
            gathered = gather(joined, [len(out)] * self.exchange.size, self.exchange)
            results = [(one[..., :-1], one[..., -1]) for one in gathered.unflatten(0, (self.exchange.size, -1))]
        out, lse = attend(q, k, v, self.own, self.scale)
        for older_out, older_lse in results:
            merge_(out, lse, older_out, older_lse)
        return out.to(q.dtype)


@dataclass(frozen=True)
class ChunkAttention:
    """New tokens that the ranks share by a plan.

    plan: this rank's. kept: its tokens without what fills the chunk up. asking: by rank, the ranges of its tokens whose
    rows have older keys. reads: how those queries, rank after rank, meet this rank's older keys.
    """

    writes: Sequence[Write]
    plan: RankPlan
    asking: Sequence[Sequence[Range]]
    reads: Reads
    exchange: Exchange
    scale: float

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `forward.Attention`."""
        counts = [sum(end - start for start, end in ranges) for ranges in self.asking]
        mine = self.asking[self.exchange.rank]
        gathering = Gathering(rows_of(q, mine), counts, self.exchange) if any(counts) else None
        out, lse = self._among_themselves(q, k, v)
        store(self.writes, layer, k, v)
        if gathering is not None:
            self._merge_older_(out, lse, self._answers(layer, gathering, k.shape[1], counts), counts)
        return out.to(q.dtype)

    def _answers(self, layer: int, asked: Gathering, kv_heads: int, counts: Sequence[int]) -> list[Tensor]:
        """What this rank's older keys give to the queries of each rank: [T, H, D + 1], the lse last."""
        out, lse = attend_stored(asked.wait(), self.reads, layer, kv_heads, self.scale)
        return list(torch.cat((out, lse.unsqueeze(-1)), dim=-1).split(list(counts)))

    def _among_themselves(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        steps = blocks(torch.stack((k, v), 1), self.plan, self.exchange)
        out, lse = attend(q, k, v, next(steps).runs, self.scale)
        for block in steps:
            keys, values = block.kv.unbind(1)
            attend_(out, lse, q, keys, values, block.runs, self.scale)
        return out, lse

    def _merge_older_(self, out: Tensor, lse: Tensor, results: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Send to each rank what was found for its queries, and merge what all found for this rank's."""
        rank, size = self.exchange.rank, self.exchange.size
        others = [peer for peer in range(size) if peer != rank]
        received = {peer: torch.empty_like(results[rank]) for peer in others if counts[rank]}
        self.exchange.start({peer: results[peer] for peer in others if counts[peer]}, received).wait()
        for peer in range(size) if counts[rank] else ():
            result = received.get(peer, results[rank])
            start = 0
            for a, b in self.asking[rank]:
                part = result[start : start + b - a]
                merge_(out[a:b], lse[a:b], part[..., :-1], part[..., -1])
                start += b - a


def _merged(results: Tensor) -> Tensor:
    """Softmax results over disjoint keys [P, T, H, D + 1], each with its lse last, as one: [T, H, D]."""
    weights = results[..., -1].softmax(dim=0).unsqueeze(-1)
    return (results[..., :-1] * weights).sum(dim=0)
