"""Packed ring attention under the name "ring" in transformers' registry of attention functions.

In: transformers' per-layer call, with the plan and the group as keyword arguments of the model's forward
(`model(..., plan=plan, group=group)`). Out: the attention output in transformers' layout. Importing this module
registers it; an unmodified model uses it with `config._attn_implementation = "ring"`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from model.attention.flash_kernels import attend, attend_
from model.attention.p2p import Group
from model.attention.plan.planner import plan_sequence
from model.attention.plan.runs import Run
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention

NAME = "ring"


def ring_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: SequencePlan | None = None,
    group: Group = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query [B, H, T, D], key and value [B, Hkv, T, D] in, ([B, T, H, D], None) out.

    With a plan, B is 1 and T this rank's tokens of the packed sequence. Without one, each row is one causal document,
    and keys beyond the queries' number are a prefix from a cache (generation; no gradient flows then). Raises
    ValueError on a mask, dropout, a sliding window, several rows with a plan, and gradients through a cache.
    """
    if attention_mask is not None:
        raise ValueError("ring attention takes documents from its plan, not from an attention mask; pad no rows")
    if dropout or sliding_window is not None:
        raise ValueError("ring attention has neither dropout nor a sliding window")
    batch, _heads, n_queries, _size = query.shape
    if plan is not None and batch != 1:
        raise ValueError(f"a plan is of one packed sequence; the batch has {batch} rows")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if plan is None and key.shape[2] != n_queries:
        out = _attend_cached(q, k, v, batch, scaling)
    else:
        out = packed_ring_attention(q, k, v, plan or _rows_as_documents(batch, n_queries), group, scaling)
    return out.unflatten(0, (batch, n_queries)), None


@lru_cache(maxsize=16)
def _rows_as_documents(batch: int, length: int) -> SequencePlan:
    return plan_sequence(np.arange(batch + 1) * length, 1)


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, batch: int, scale: float | None) -> Tensor:
    """Each row's queries are its last tokens: they see all earlier keys, and their own causally."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("ring attention has no backward through cached keys")
    n, m = len(q) // batch, len(k) // batch
    if n > m:
        raise ValueError(f"{n} queries with only {m} keys")
    own = [Run(row * n, (row + 1) * n, (row + 1) * m - n, (row + 1) * m, True) for row in range(batch)]
    older = [Run(row * n, (row + 1) * n, row * m, (row + 1) * m - n, False) for row in range(batch)]
    out, lse = attend(q, k, v, own, scale)
    attend_(out, lse, q, k, v, older, scale)
    return out.to(q.dtype)


AttentionInterface.register(NAME, ring_attention_forward)
