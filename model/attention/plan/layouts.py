"""Layouts: which tokens of a packed sequence each rank holds.

In: the length and the number of ranks. Out: an `Assignment`, from which everything else is derived
(`sequence_plan.py`); any assignment will do. The layout in `balanced_layout.py` looks at the documents too. None pads:
the ranks must only divide the length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
