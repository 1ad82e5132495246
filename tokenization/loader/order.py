"""The global order of sequences: which source and which of its sequences stands at position p of training.

In: a seed, an epoch, the sequences and tokens that each source has, and their weights. Out: (source, sequence) of any
positions, without end and without replaying what came before. Ranks, workers and accumulation do not enter: they only
share the positions out, so a run may stop on four ranks and go on with one.

Sources are interleaved by a period of slots in which each has exactly its share. The k-th of a source's n slots stands
somewhere, by the seed, in the k-th n-th of the period: every stretch is in proportion to within a few sequences, yet no
beat arises by which one data-parallel rank would always draw the same source. Weights are shares of the tokens of
documents, and a source whose sequences are less full has more slots for it: its share divided by its mean of tokens a
sequence, which a pass through the source meets exactly. Each source runs through a permutation of its own per pass
(`permutation.permute`), and begins its next pass when it is through.
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

    sizes: sequences of each source. weights: shares of the tokens, any positive scale; None is by size, so that a pass
    of each ends together. 0 leaves a source out. epoch: another order of the same data, as if with a new seed. tokens:
    of the documents of each source, padding not counted; None where all sequences are as full. Raises UserError on
    weights that cannot be met.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    epoch: int = 0
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        weights = self.sizes if self.weights is None else self.weights
        if len(weights) != len(self.sizes):
            raise UserError(f"{len(weights)} mix weights for {len(self.sizes)} sources: give one a source")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise UserError(f"mix weights {list(weights)} must be 0 or more, and one of them more")
        for number, (size, weight) in enumerate(zip(self.sizes, weights)):
            if weight and not size:
                raise UserError(f"source {number} of the mix holds no sequences: give it weight 0 or more data")
            if weight and self.tokens is not None and self.tokens[number] < 1:
                raise UserError(f"source {number} of the mix holds no tokens: give it weight 0 or more data")

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
        """Plain JSON to go on from: `position` is the next sequence to be used."""
        return {"seed": self.seed, "epoch": self.epoch, "position": position}

    def position(self, state: Mapping[str, Any]) -> int:
        """The position of a state of this order. Raises UserError on the state of another."""
        if (state["seed"], state["epoch"]) != (self.seed, self.epoch):
            raise UserError(
                f"the loader state to resume from has seed {state['seed']} and epoch {state['epoch']}, the recipe "
                f"{self.seed} and {self.epoch}: set them back or start the stage anew"
            )
        return int(state["position"])

    def _shares(self) -> list[Fraction]:
        """Of the sequences, by source; they sum to 1."""
        parts = [Fraction(str(weight)) for weight in (self.sizes if self.weights is None else self.weights)]
        if self.weights is not None and self.tokens is not None:
            parts = [part and part * size / tokens for part, size, tokens in zip(parts, self.sizes, self.tokens)]
        return [part / sum(parts) for part in parts]

    @functools.cached_property
    def _period(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source of each slot, how many slots of that source stand before it, slots of each source."""
        slots = _slots(self._shares())
        source = np.repeat(np.arange(len(slots)), slots)
        nth = np.concatenate([np.arange(n) for n in slots])
        jitter = (mix64(derive_key(self.seed, self.epoch, source) ^ nth.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53
        order = np.argsort((nth + jitter) / slots[source], kind="stable")
        return source[order], nth[order], slots


def _slots(shares: Sequence[Fraction]) -> np.ndarray:
    """Whole slots of each source in a period: exact where a period that long will do, else the largest remainders."""
    period = math.lcm(*(share.denominator for share in shares))
    period = min(period * -(-SHORTEST_PERIOD // period), LONGEST_PERIOD)
    # A source with any weight gets a slot at least: a share below one in a million is rounded up rather than dropped.
    slots = [max(int(share * period), share > 0) for share in shares]
    remainders = [share * period - n for share, n in zip(shares, slots)]
    for number in sorted(range(len(slots)), key=lambda n: -remainders[n])[: max(0, period - sum(slots))]:
        slots[number] += 1
    return np.array(slots, dtype=np.int64)
