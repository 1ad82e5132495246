"""The global order of sequences: the source, and the sequence within it, at each position of training.

In: a seed, an epoch, the sequences, tokens and weight of each source. Out: (source, sequence) at any positions, without
end and without replaying earlier ones. Ranks, workers and accumulation only share out the positions, so a run can stop
on four ranks and resume on one.

Sources are interleaved by a period of slots, of which each source has exactly its share. The k-th of a source's n slots
is at a random place, by the seed, in the k-th of n equal parts of the period: every stretch has the right proportions
to within a few sequences, but no rank always draws the same source. Weights are shares of the tokens of documents, so
the slots of a source are by its weight divided by its mean number of tokens per sequence. Each pass over a source
follows a permutation of its own (`permutation.permute`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from storage.errors import UserError
from tokenization.permutation import derive_key, mix64, permute

SHORTEST_PERIOD = 1 << 12
LONGEST_PERIOD = 1 << 20


@dataclass(frozen=True)
class SequenceOrder:
    """A pure function of (seed, epoch, position).

    sizes: sequences of each source. weights: shares of the tokens, on any positive scale; 0 leaves a source out; None
    means by size, so that all sources end a pass together. epoch: selects another order of the same data, as another
    seed does. tokens: of the documents of each source, without padding; None where all sequences are equally full.
    Raises UserError on weights that cannot be met.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    epoch: int = 0
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        weights = self.sizes if self.weights is None else self.weights
        if len(weights) != len(self.sizes):
            raise UserError(f"{len(weights)} mix weights for {len(self.sizes)} sources: give one per source")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise UserError(f"mix weights {list(weights)} must be 0 or more, and at least one of them above 0")
        for what, counts in (("sequences", self.sizes), ("tokens", self.tokens or self.sizes)):
            for number, (count, weight) in enumerate(zip(counts, weights)):
                if weight and count < 1:
                    raise UserError(f"source {number} of the mix holds no {what}: give it weight 0 or more data")

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source int64 [n], sequence within the source int64 [n]) at `positions` (int64 [n], 0 or more)."""
        positions = np.asarray(positions, dtype=np.int64)
        source_of, nth_of, slots = self._period
        period, slot = np.divmod(positions, len(source_of))
        source = source_of[slot]
        drawn = period * slots[source] + nth_of[slot]
        sequence = np.empty_like(positions)
        for number in np.unique(source):
            here = source == number
            passes, index = np.divmod(drawn[here], self.sizes[number])
            key = derive_key(self.seed, self.epoch, int(number), passes)
            sequence[here] = permute(index, self.sizes[number], key)
        return source, sequence

    def state(self, position: int) -> dict[str, int]:
        """Plain JSON to resume from: `position` is that of the next sequence."""
        return {"seed": self.seed, "epoch": self.epoch, "position": position}

    def position(self, state: Mapping[str, Any]) -> int:
        """The position in a state of this order. Raises UserError on the state of another order."""
        if (state["seed"], state["epoch"]) != (self.seed, self.epoch):
            raise UserError(
                f"the loader state to resume from has seed {state['seed']} and epoch {state['epoch']}, the recipe "
                f"{self.seed} and {self.epoch}: restore them in the recipe or restart the stage"
            )
        return int(state["position"])

    @functools.cached_property
    def _period(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The source of each slot, the number of earlier slots of that source, the number of slots of each source."""
        parts = [Fraction(str(weight)) for weight in (self.sizes if self.weights is None else self.weights)]
        if self.weights is not None and self.tokens is not None:
            parts = [part and part * size / tokens for part, size, tokens in zip(parts, self.sizes, self.tokens)]
        slots = _slots([part / sum(parts) for part in parts])
        source = np.repeat(np.arange(len(slots)), slots)
        nth = np.concatenate([np.arange(n) for n in slots])
        jitter = (mix64(derive_key(self.seed, self.epoch, source) ^ nth.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53
        order = np.argsort((nth + jitter) / slots[source], kind="stable")
        return source[order], nth[order], slots


def _slots(shares: Sequence[Fraction]) -> np.ndarray:
    """Slots of each source in a period: exact shares if the period is long enough, else by the largest remainders."""
    period = math.lcm(*(share.denominator for share in shares))
    period = min(period * -(-SHORTEST_PERIOD // period), LONGEST_PERIOD)
    # A source with any weight has at least one slot: a share below one in a million is rounded up, not dropped.
    slots = [max(int(share * period), share > 0) for share in shares]
    remainders = [share * period - n for share, n in zip(shares, slots)]
    for number in sorted(range(len(slots)), key=lambda n: -remainders[n])[: max(0, period - sum(slots))]:
        slots[number] += 1
    return np.array(slots, dtype=np.int64)
