"""Layouts: which tokens of a packed sequence each rank holds.

In: the sequence's length and the number of ranks. Out: for each rank the half-open ranges of the packed sequence it
holds. A layout decides only this; `plan.py` derives everything else, so any assignment of ranges to ranks will do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def contiguous(n_tokens: int, sp: int) -> list[np.ndarray]:
    """Rank r holds the r-th of `sp` equal chunks. Causal work then grows with the rank.

    Returns one int64 [1, 2] array of ranges a rank. Raises ValueError where `sp` does not divide `n_tokens`.
    """
    bounds = _chunk_bounds(n_tokens, sp, "contiguous", sp)
    return [bounds[r : r + 2].reshape(1, 2) for r in range(sp)]


def zigzag(n_tokens: int, sp: int) -> list[np.ndarray]:
    """Rank r holds the r-th and the r-th last of `2 * sp` equal chunks, which evens the causal work of one document.

    Returns one int64 [2, 2] array of ranges a rank. Raises ValueError where `2 * sp` does not divide `n_tokens`.
    """
    bounds = _chunk_bounds(n_tokens, 2 * sp, "zigzag", sp)
    return [np.array([bounds[c : c + 2] for c in (r, 2 * sp - 1 - r)]) for r in range(sp)]


LAYOUTS: dict[str, Callable[[int, int], list[np.ndarray]]] = {"contiguous": contiguous, "zigzag": zigzag}


def _chunk_bounds(n_tokens: int, chunks: int, layout: str, sp: int) -> np.ndarray:
    if n_tokens % chunks:
        raise ValueError(
            f"the {layout} layout on {sp} ranks cuts a sequence into {chunks} equal chunks; "
            f"{n_tokens} tokens do not divide by that"
        )
    return np.arange(chunks + 1, dtype=np.int64) * (n_tokens // chunks)
