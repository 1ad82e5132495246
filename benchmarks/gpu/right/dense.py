"""Attention by its definition, in fp64 and in rows that fit: what every kernel on a card is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention.plan.runs import Run

ROWS = 1024
"""Queries whose scores exist at once."""


def dense_attention(tensors: Sequence[Tensor], runs: Sequence[Run]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention over the pairs of `runs`, in fp64: out [T, H, D], lse [T, H], dq, dk, dv.

    tensors: q [T, H, D], k, v [N, Hkv, D], grad_out [T, H, D]. A query without a key gives 0, and -inf as its lse.
    """
    q, k, v, grad_out = (x.double() for x in tensors)
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
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
        inside = (query >= q0) & (query < q1) & (key >= k0) & (key < k1)
        allowed |= inside & (key - k0 <= query - q0 + (k1 - k0) - (q1 - q0)) if causal else inside
    return allowed


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact tensor; NaN where x has one.

    A tensor that is nearly zero is measured by a tenth of what a random one would be: a document of one token has no
    gradient of its query, and what rounding leaves there is not to be divided by nothing.
    """
    return float((x.double() - exact).norm() / max(float(exact.norm()), 0.1 * exact.numel() ** 0.5))
