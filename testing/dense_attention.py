"""Attention by its definition, in fp64 and in rows that fit: what every kernel and every ring is held against.

In: random [q, k, v, grad_out] of a packed sequence, and its runs or document boundaries. Out: out, dq, dk, dv, and the
error of others' against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.attention.plan.runs import Run

ROWS = 1024
"""Queries whose scores exist at once."""


def random_tensors(
    n_tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """[q [S, H, D], k, v [S, Hkv, D], grad_out [S, H, D]] of a packed sequence, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(n_tokens, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype) for shape in shapes]


def dense_results(tensors: Sequence[Tensor], cu_seqlens: np.ndarray, scale: float | None = None) -> list[Tensor]:
    """[out, dq, dk, dv] in fp64 of a packed sequence's [q, k, v, grad_out], each document causal."""
    out, _, *gradients = dense_attention(tensors, document_runs(cu_seqlens), scale)
    return [out, *gradients]


def document_runs(cu_seqlens: np.ndarray) -> list[Run]:
    """One causal run a document of a packed sequence."""
    return [Run(a, b, a, b, True) for a, b in pairwise(cu_seqlens.tolist())]


def dense_attention(
    tensors: Sequence[Tensor], runs: Sequence[Run], scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention over the pairs of `runs`, in fp64: out [T, H, D], lse [T, H], dq, dk, dv.

    tensors: q [T, H, D], k, v [N, Hkv, D], grad_out [T, H, D]. A query without a key gives 0, and -inf as its lse.
    scale: 1 / sqrt(D) where None.
    """
    q, k, v, grad_out = (x.double() for x in tensors)
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    out, lse, dq = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf), torch.zeros_like(q)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, len(q), ROWS):
        rows = slice(start, min(start + ROWS, len(q)))
        allowed = _allowed(rows, len(k), runs, q.device)
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys).mul_(scale).masked_fill_(~allowed, -torch.inf)
        of_rows = scores.logsumexp(-1)
        weights = (scores - of_rows.masked_fill(of_rows == -torch.inf, 0).unsqueeze(-1)).exp()
        result = torch.einsum("hqk,khd->qhd", weights, values)
        out[rows], lse[rows] = result, of_rows.t()
        # d scores = p * (dp - sum(dp * p)), of which the sum is grad_out . out (FlashAttention-2, arXiv 2307.08691).
        dp = torch.einsum("qhd,khd->hqk", grad_out[rows], values)
        ds = weights * (dp - (grad_out[rows] * result).sum(-1).t().unsqueeze(-1)) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, keys)
        dk += torch.einsum("hqk,qhd->khd", ds, q[rows])
        dv += torch.einsum("hqk,qhd->khd", weights, grad_out[rows])
    shape = (len(k), k.shape[1], groups, k.shape[2])
    return out, lse, dq, dk.view(shape).sum(2), dv.view(shape).sum(2)


def _allowed(rows: slice, n_keys: int, runs: Sequence[Run], device: torch.device) -> Tensor:
    """bool [rows, N]: which keys a query sees; in a causal run the last query sees the last key."""
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None]
    allowed = torch.zeros(len(query), n_keys, dtype=torch.bool, device=device)
    for q0, q1, k0, k1, causal in runs:
        if q1 <= rows.start or rows.stop <= q0:
            continue
        inside = (query >= q0) & (query < q1) & (key >= k0) & (key < k1)
        allowed |= inside & (key - k0 <= query - q0 + (k1 - k0) - (q1 - q0)) if causal else inside
    return allowed


def allowed_pairs(cu_seqlens: np.ndarray) -> np.ndarray:
    """bool [S, S]: query i may see key j of a packed sequence."""
    document = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    return (document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)


def relative_error(x: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Norm of the difference over norm of the exact tensor; NaN where x has one.

    least: root mean square that the exact tensor counts as at least. A document of one token has no gradient of its
    query, and what rounding leaves there is not to be divided by nothing.
    """
    exact = exact.detach().double()
    floor = least * exact.numel() ** 0.5
    return float((x.detach().double() - exact).norm() / exact.norm().clamp(min=floor))
