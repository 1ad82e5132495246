"""Rows of a packed sequence to the ranks that hold them, and back in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
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


def gather_in_order(rows: Tensor, plan: SequencePlan, group: dist.ProcessGroup | None) -> Tensor:
    """The whole sequence's rows [S, ...] on every rank, from each rank's [T, ...]. Collective; without gradient."""
    if group is None:
        return in_order([rows], plan)
    parts = [torch.empty_like(rows) for _ in range(plan.sp)]
    dist.all_gather(parts, rows.detach().contiguous(), group)
    return in_order(parts, plan)
