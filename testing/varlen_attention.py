"""FlashAttention's variable-length operators by their definition, on any device and in any dtype.

They stand in for torch's `_flash_attention_forward` and `_flash_attention_backward` of a card, by the names that torch
gives their arguments: where there is no card, where fp32 is wanted, which the card's own do not take, and where a call
that swaps two arguments is to be found. What torch demands of a call is demanded here too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the forward returns first, of sequences end to end: out [rows, H, D] and lse [H, rows]."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    _check_heads(query, key)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for rows, keys in _sequences(cum_seq_q, cum_seq_k, max_q, max_k):
        scores = _scores(query[rows], key[keys], is_causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _of_all_heads(value[keys], query))
    return out, lse


def varlen_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor,
    *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, by the out and the lse given, which are of all keys and not of these alone."""
    assert dropout_p == 0.0
    assert logsumexp.shape == (query.shape[1], len(query))
    assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
    _check_heads(query, key)
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    for rows, keys in _sequences(cum_seq_q, cum_seq_k, max_q, max_k):
        weights = (_scores(query[rows], key[keys], is_causal, scale) - logsumexp[:, rows, None]).exp()
        # d scores = p * (dp - sum(dp * p)), of which the sum is grad . out (FlashAttention-2, arXiv 2307.08691).
        dp = torch.einsum("qhd,khd->hqk", grad_out[rows], _of_all_heads(value[keys], query))
        ds = weights * (dp - (grad_out[rows] * out[rows]).sum(-1).t()[..., None]) * scale
        dq[rows] += torch.einsum("hqk,khd->qhd", ds, _of_all_heads(key[keys], query))
        dk[keys] += _of_kv_heads(torch.einsum("hqk,qhd->khd", ds, query[rows]), key)
        dv[keys] += _of_kv_heads(torch.einsum("hqk,qhd->khd", weights, grad_out[rows]), value)
    return dq, dk, dv


def _check_heads(query: Tensor, key: Tensor) -> None:
    assert query.shape[-1] % 8 == 0
    assert query.shape[1] % key.shape[1] == 0


def _sequences(cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """The rows of queries and of keys of each sequence."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    queries, keys = ([slice(*pair) for pair in pairwise(bounds.tolist())] for bounds in (cum_seq_q, cum_seq_k))
    assert [max(part.stop - part.start for part in parts) for parts in (queries, keys)] == [max_q, max_k]
    return list(zip(queries, keys, strict=True))


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    """[H, queries, keys], -inf where a query does not see a key; in a causal run the last query sees the last key."""
    scores = torch.einsum("qhd,khd->hqk", q, _of_all_heads(k, q)) * scale
    if not is_causal:
        return scores
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    return scores.masked_fill(~seen, -torch.inf)


def _of_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """[N, Hkv, D] as [N, H, D]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _of_kv_heads(x: Tensor, kv: Tensor) -> Tensor:
    """[N, H, D] summed to [N, Hkv, D]."""
    return x.unflatten(1, (kv.shape[1], -1)).sum(2)
