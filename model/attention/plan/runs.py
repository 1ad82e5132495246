"""What one rank executes: the runs of its kernel calls, and the messages that bring it keys, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

Range = tuple[int, int]

AHEAD = 2
"""Stages under way while a block is computed on."""
KEPT_BACK = 2
"""With s stages, a backward keeps 1 / (KEPT_BACK * s) of a rank's own pairs for its end."""


class Run(NamedTuple):
    """One rectangle or triangle of attention: queries [q_start, q_end) over keys [k_start, k_end), never empty.

    Queries are counted in the rank's storage; keys in the storage too where they are its own, otherwise in what the
    stage received. A causal run is square: its i-th query sees its first i + 1 keys. Otherwise every query sees
    every key.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: bool

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key."""
        n, m = self.q_end - self.q_start, self.k_end - self.k_start
        return n * (n + 1) // 2 if self.causal else n * m


class KernelCall:
    """One variable-length kernel call for all runs of one kind, which are its sequences.

    queries, keys: the ranges of the runs. cu_seqlens: int32 [2, runs + 1], of queries and of keys. longest: the most
    queries and the most keys of a run. on_device: cu_seqlens by device, once copied there.
    """

    def __init__(self, runs: Sequence[Run], causal: bool) -> None:
        self.causal = causal
        self.queries = [(run.q_start, run.q_end) for run in runs]
        self.keys = [(run.k_start, run.k_end) for run in runs]
        sizes = np.array([[end - start for start, end in ranges] for ranges in (self.queries, self.keys)])
        self.cu_seqlens = np.pad(np.cumsum(sizes, 1), ((0, 0), (1, 0))).astype(np.int32)
        self.longest = (int(sizes[0].max()), int(sizes[1].max()))
        self.on_device: dict[Any, Any] = {}


class Runs(tuple[Run, ...]):
    """The runs over one block of keys, with what kernel calls over them take derived once."""

    @cached_property
    def calls(self) -> tuple[KernelCall, ...]:
        """One a kind: first the causal runs, then the others."""
        kinds = ([run for run in self if run.causal == causal] for causal in (True, False))
        return tuple(KernelCall(runs, runs[0].causal) for runs in kinds if runs)


class Message(NamedTuple):
    """Keys to or from one peer, a rank of the group: ranges of the sender's storage, joined in this order."""

    peer: int
    ranges: tuple[Range, ...]

    @property
    def n_keys(self) -> int:
        """Keys sent."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True)
class Stage:
    """One step of the exchange: messages received, joined in this order, messages sent, and the runs over the received.

    On the route "relay" there is one stage a hop: the previous rank's block is received, and the block received a stage
    before is sent; in the first stage it is the rank's own.
    """

    receives: tuple[Message, ...]
    sends: tuple[Message, ...]
    runs: Runs

    @property
    def n_keys(self) -> int:
        """Keys received."""
        return sum(message.n_keys for message in self.receives)


@dataclass(frozen=True)
class RankPlan:
    """Runs over a rank's own keys, then the stages in order. n_tokens: of its storage in the ring."""

    n_tokens: int
    route: str
    local: Runs
    stages: tuple[Stage, ...]

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key that this rank computes: its work, per head."""
        return sum(run.n_pairs for run in self.local) + sum(run.n_pairs for s in self.stages for run in s.runs)

    @cached_property
    def backward_local(self) -> tuple[Runs, Runs]:
        """The runs over its own keys that a backward begins with, and those that it keeps for the end.

        The gradients of the last stage travel while the latter are computed; the fewer the stages, the more travel.
        """
        if not self.stages:
            return self.local, Runs()
        pairs = sum(run.n_pairs for run in self.local)
        return cut_runs(self.local, pairs - pairs // (KEPT_BACK * len(self.stages)))

    @property
    def calls(self) -> list[KernelCall]:
        """Every kernel call of a forward and a backward."""
        blocks = {id(runs): runs for runs in (self.local, *self.backward_local, *(stage.runs for stage in self.stages))}
        return [call for runs in blocks.values() for call in runs.calls]


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same tokens in fewer ranges: a range that begins where the one before it ends is joined to it."""
    merged: list[Range] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def joined_runs(runs: Iterable[Run]) -> Runs:
    """The same pairs in fewer runs: neighbours in queries over the same keys, or the reverse, are joined.

    Causal runs stay as they are.
    """
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last is None or run.causal or last.causal:
            merged.append(run)
        elif last[:2] == run[:2] and last.k_end == run.k_start:
            merged[-1] = last._replace(k_end=run.k_end)
        elif last[2:4] == run[2:4] and last.q_end == run.q_start:
            merged[-1] = last._replace(q_end=run.q_end)
        else:
            merged.append(run)
    return Runs(merged)


def cut_runs(runs: Sequence[Run], pairs: int) -> tuple[Runs, Runs]:
    """Causal runs cut in two parts, at most `pairs` pairs in the first; one run may be cut in three."""
    first: list[Run] = []
    for i, run in enumerate(runs):
        if run.n_pairs > pairs:
            n = (math.isqrt(8 * pairs + 1) - 1) // 2  # the most queries whose n (n + 1) / 2 pairs are as many
            if n == 0:
                return Runs(first), Runs(runs[i:])
            q, k = run.q_start + n, run.k_start + n
            first.append(run._replace(q_end=q, k_end=k))
            rest = (Run(q, run.q_end, run.k_start, k, False), run._replace(q_start=q, k_start=k))
            return Runs(first), Runs((*rest, *runs[i + 1 :]))
        first.append(run)
        pairs -= run.n_pairs
    return Runs(first), Runs()
