"""Rows of a packed sequence to the ranks that hold them, and back in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from model.attention.plan.sequence_plan import SequencePlan

Array = TypeVar("Array", np.ndarray, Tensor)


def dispatch(array: Array, plan: SequencePlan, rank: int) -> Array:
    """The rows of a packed sequence that `rank` holds, in storage order: [S, ...] to [T, ...]."""
    return array[plan.indices(rank)]


def in_order(parts: Sequence[Array], plan: SequencePlan) -> Array:
    """The inverse of `dispatch`: one [T, ...] a rank, in rank order, back to packed order [S, ...]."""
    order = np.argsort(np.concatenate([plan.indices(rank) for rank in range(plan.sp)]))
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[torch.from_numpy(order).to(parts[0].device)]
    return np.concatenate(parts)[order]
