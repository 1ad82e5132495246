"""What a loader yields: micro-batches of packed sequences, or what a function makes of them, in one batch per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Part = TypeVar("Part")
"""What a batch consists of: a `MicroBatch`, or what `Loader.prepared` makes of it."""


@dataclass(frozen=True)
class MicroBatch:
    """`rows` packed sequences end to end: S' = rows * S tokens for one forward pass, equal on all ranks of an sp group.

    tokens: int32 [S']. labels: int32 [S'], the next token where it is a target with loss, else 0. loss_weight: float32
    [S'], aligned to labels, before the division by N; 0 where there is no target. cu_seqlens: int32 [n+1], from 0 to
    S', padding runs included. keys: of the sequences, in order. source: int16 [S'], the number of each token's source
    in the mixture, -1 in padding; None if all tokens are from source 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_weight: np.ndarray
    cu_seqlens: np.ndarray
    keys: tuple[str, ...]
    source: np.ndarray | None = None


@dataclass(frozen=True)
class Batch(Generic[Part]):
    """One optimizer step of one data-parallel rank.

    n_examples: N of the whole global batch, equal on all ranks, at least 1. lost: keys of those sequences of the global
    batch that padding replaces because their shards are bad.
    """

    micro_batches: tuple[Part, ...]
    n_examples: int
    lost: tuple[str, ...] = ()
