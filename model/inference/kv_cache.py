"""Keys and values of a batch of sequences on one rank: preallocated slots that are written once and never moved.

In: keys and values of new tokens. Out: the runs by which queries meet what is stored. A `Slab` is memory for some rows,
allocated at once: [2, Hkv, slots, D] a layer. Heads lie outermost, so that one query reads each head's keys as one
stream; token by token, a query over 64K keys takes a CPU three times as long. A row is a list of extents, ranges of
slots; a fork of it reads the same extents and writes to one of its own, so a shared prefix is stored once.
When a row's room is used up, it goes on in a new slab: nothing is ever concatenated or copied. Of what is kept in 8
bits a bounded tile at a time is converted, never all of it.

With several ranks each holds some of a row's tokens, and in any order: attention is a sum over keys, whose positions
are in them already. Memory is bound by what this rank was given, plus the room reserved ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.plan.runs import Run, Runs
from model.inference.scaled_numbers import LARGEST, scaled, unscaled

MAX_CONVERTED = 8192
"""Keys that are converted at a time to the dtype that computes: 8 bits everywhere, and on a CPU, in fp32, 16."""


class KVShape(NamedTuple):
    """What a token takes: layers, kv heads, head size."""

    layers: int
    kv_heads: int
    head_dim: int


class Slab:
    """Slots for keys and values: `kv[layer]` is [2, Hkv, slots, D], `scales[layer]`, of 8 bits, [2, Hkv, slots, 1]."""

    def __init__(self, shape: KVShape, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (2, shape.kv_heads, slots, shape.head_dim)
        self.kv = [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.scales: list[Tensor] = []
        if dtype in LARGEST:
            self.scales = [torch.empty((*size[:3], 1), device=device) for _ in range(shape.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(x.nbytes for x in (*self.kv, *self.scales))

    @property
    def slots(self) -> range:
        """All."""
        return range(self.kv[0].shape[2])

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values [n, Hkv, D] into the slots from `slot` on."""
        slots = slice(slot, slot + len(k))
        for part, x in enumerate((k.transpose(0, 1), v.transpose(0, 1))):
            if self.scales:
                x, self.scales[layer][part, :, slots] = scaled(x, self.kv[layer].dtype)
            self.kv[layer][part, :, slots].copy_(x)

    def read(self, layer: int, slots: range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [n, Hkv, D] of these slots: views, and of 8 bits copies in `dtype`."""
        kv = self.kv[layer][:, :, slots.start : slots.stop]
        if self.scales:
            kv = unscaled(kv, self.scales[layer][:, :, slots.start : slots.stop], dtype)
        keys, values = kv.transpose(1, 2)
        return keys, values


@dataclass
class Extent:
    """Slots [start, start + used) of a slab that a row has filled, and how many more behind them are its own."""

    slab: Slab
    start: int
    used: int
    room: int


@dataclass
class Row:
    """One sequence: its tokens so far on all ranks, and where this rank's keys of it lie."""

    length: int = 0
    extents: list[Extent] = field(default_factory=list)

    @property
    def stored(self) -> int:
        """Tokens of it on this rank."""
        return sum(extent.used for extent in self.extents)

    @property
    def room(self) -> int:
        """Tokens that it can take without new memory."""
        return self.extents[-1].room if self.extents else 0


class Write(NamedTuple):
    """New tokens [start, end) of a step go to the slots of `slab` from `slot` on."""

    slab: Slab
    slot: int
    start: int
    end: int


class Read(NamedTuple):
    """What queries meet in some slots of a slab. runs: count keys from the first of these slots."""

    slab: Slab
    slots: range
    runs: Runs


class Reads(NamedTuple):
    """All that queries meet. complete: there is one read, whose runs meet every query exactly once."""

    parts: tuple[Read, ...]
    complete: bool


class KVCache:
    """The rows of a batch on this rank. dtype: that keys and values are kept in, the model's or one of 8 bits."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device, rows: Sequence[Row]) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.rows = list(rows)

    @property
    def nbytes(self) -> int:
        """Bytes held, each slab once."""
        slabs = {id(extent.slab): extent.slab for row in self.rows for extent in row.extents}
        return sum(slab.nbytes for slab in slabs.values())

    def select(self, rows: Sequence[int]) -> KVCache:
        """The rows of these numbers, in this order, which go on writing where they were: the others are dropped."""
        return KVCache(self.shape, self.dtype, self.device, [self.rows[row] for row in rows])

    def fork(self, rows: Sequence[int]) -> KVCache:
        """New rows that begin as these; a row may be named several times. No key is copied, and none overwritten."""
        forks = [
            Row(self.rows[row].length, [replace(e, room=0) for e in self.rows[row].extents if e.used]) for row in rows
        ]
        return KVCache(self.shape, self.dtype, self.device, forks)

    def reserve(self, tokens: Sequence[int]) -> None:
        """See that each row can take so many more tokens here; rows that cannot get their room in one new slab."""
        wanted = [n if n > row.room else 0 for row, n in zip(self.rows, tokens, strict=True)]
        if sum(wanted) == 0:
            return
        slab = Slab(self.shape, sum(wanted), self.dtype, self.device)
        start = 0
        for row, n in zip(self.rows, wanted):
            if n:
                row.extents.append(Extent(slab, start, 0, n))
                start += n

    def claim(self, tokens: Sequence[tuple[int, int, int]]) -> list[Write]:
        """Slots for new tokens, given as (row, start, end) by their place in a step's storage; reserved before."""
        writes = []
        for number, start, end in tokens:
            if end > start:
                extent = self.rows[number].extents[-1]
                writes.append(Write(extent.slab, extent.start + extent.used, start, end))
                extent.used += end - start
                extent.room -= end - start
        return writes

    def reads(self, queries: Sequence[tuple[int, int]], heads_per_kv: int) -> Reads:
        """How queries, given as (row, number) in the order of their storage, meet all that is stored of their rows.

        Query ranges count each query `heads_per_kv` times, as `attend_stored` folds the heads that share keys.
        """
        by_slab: dict[int, tuple[Slab, list[Run]]] = {}
        met, start = 0, 0
        for number, n in queries:
            end = start + n * heads_per_kv
            for extent in self.rows[number].extents if n else ():
                runs = by_slab.setdefault(id(extent.slab), (extent.slab, []))[1]
                for first, last in self._cut(extent):
                    runs.append(Run(start, end, first, last, False))
                    met += end - start
            start = end
        parts = tuple(part for slab, runs in by_slab.values() for part in self._reads(slab, runs))
        return Reads(parts, complete=len(parts) == 1 and met == start)

    def _cut(self, extent: Extent) -> Iterator[tuple[int, int]]:
        """Ranges of slots that one kernel call may take."""
        end = extent.start + extent.used
        is_converted = self.dtype in LARGEST or (self.device.type == "cpu" and self.dtype.itemsize < 4)
        step = MAX_CONVERTED if is_converted else max(1, extent.used)
        yield from pairwise([*range(extent.start, end, step), end])

    def _reads(self, slab: Slab, runs: Sequence[Run]) -> Iterator[Read]:
        """The CPU takes all runs of a slab; a CUDA call takes one, since it would copy the keys of several together."""
        shared = _over_same_keys(runs)
        if self.dtype in LARGEST:
            for run in shared:
                whole = run._replace(k_start=0, k_end=run.k_end - run.k_start)
                yield Read(slab, range(run.k_start, run.k_end), Runs((whole,)))
        elif self.device.type == "cpu":
            yield Read(slab, slab.slots, Runs(shared))
        else:
            for run in shared:
                yield Read(slab, slab.slots, Runs((run,)))


def _over_same_keys(runs: Sequence[Run]) -> list[Run]:
    """The same pairs in fewer runs: neighbouring queries over the same keys, as of a shared prefix, are one."""
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.k_start, run.k_end, run.q_start)):
        if joined and joined[-1][2:4] == run[2:4] and joined[-1].q_end == run.q_start:
            joined[-1] = joined[-1]._replace(q_end=run.q_end)
        else:
            joined.append(run)
    return joined


def store(writes: Sequence[Write], layer: int, k: Tensor, v: Tensor) -> None:
    """Put new keys and values [T, Hkv, D] of a layer into the slots claimed for them."""
    for slab, slot, start, end in writes:
        slab.write(layer, slot, k[start:end], v[start:end])
