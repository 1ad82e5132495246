"""Layouts: which tokens of a packed sequence each rank holds; and the choices of a plan by name.

In: the length and the number of ranks. Out: an `Assignment`, from which everything else is derived
(`sequence_plan.py`); any assignment will do. The layout in `balanced_layout.py` looks at the documents too. None pads:
the ranks must only divide the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from storage.setting_types import Positive

Layout = Literal["contiguous", "zigzag", "shared-0.5%", "shared-3%", "shared-10%", "shared-30%"]
Route = Literal["direct", "relay"]


@dataclass(frozen=True)
class AttentionOptions:
    """How a sequence is shared by its sp ranks; None leaves a choice to the planner."""

    layout: Layout | None = None
    """Which tokens each rank holds: contiguous, zigzag, or shared-0.5% to shared-30%, which share each document over
    the fewest ranks that keep the work of all within so much of its mean."""
    ulysses: Positive | None = None
    """Neighbouring ranks that split the heads among them instead of the keys; divides sp and the model's kv heads."""
    route: Route | None = None
    """`direct` sends each rank the keys it needs, `relay` passes all keys on from neighbour to neighbour."""

    def unfit_for(self, kv_heads: int) -> str | None:
        """What is wrong with these choices for a model of `kv_heads`, or None."""
        if self.ulysses is None or kv_heads % self.ulysses == 0:
            return None
        return f"ulysses {self.ulysses} does not divide the model's {kv_heads} kv heads; choose a divisor"


class Assignment(NamedTuple):
    """Pieces of the packed sequence in order, int64 [n] each: piece i begins at start[i] and lies on rank owner[i].

    A piece ends where the next begins, the last at the end of the sequence.
    """

    start: np.ndarray
    owner: np.ndarray


def contiguous(n_tokens: int, ranks: int) -> Assignment:
    """Rank r holds the r-th of `ranks` equal chunks. Least communication for many short documents."""
    return Assignment(np.arange(ranks) * (n_tokens // ranks), np.arange(ranks))


def zigzag(n_tokens: int, ranks: int) -> Assignment:
    """Rank r holds the r-th and the r-th last of `2 * ranks` chunks, which evens the causal work of one long document.

    Where a rank's share is odd, ranks take the larger half from the head and from the tail by turns.
    """
    share = n_tokens // ranks
    rank = np.arange(ranks)
    head = (share + rank % 2) // 2
    sizes = np.concatenate([head, (share - head)[::-1]])
    owner = np.concatenate([rank, rank[::-1]])
    filled = sizes > 0
    return Assignment((np.cumsum(sizes) - sizes)[filled], owner[filled])
