"""The operators that a card's attention calls, by their definition and in any dtype: how a card trains in fp32 here.

FlashAttention on CUDA takes half precision alone, so `train.precision: fp32` has no attention on a card, and bf16 is
too coarse to hold a gradient to 1e-5. Within `exact_attention` torch's two operators are replaced by these, with their
arguments and results; all around them stays: the runs, the rows that are gathered and scattered, the padding of heads,
the merge of blocks. The operators themselves are held against fp64 by the part `kernels`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor

from model.attention import flash_kernels


@contextlib.contextmanager
def exact_attention() -> Iterator[None]:
    """Within it attention takes the way of a card, on any device and in any dtype, by the operators below."""
    with mock.patch.multiple(
        flash_kernels,
        _cuda_forward=varlen_forward,
        _cuda_backward=varlen_backward,
        _on_cpu=lambda q: False,
        _has_no_kernel=lambda q: False,
    ):
        yield


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `torch.ops.aten._flash_attention_forward` of sequences end to end: out [rows, H, D] and lse [H, rows]."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for rows, keys in _sequences(cu_q, cu_k):
        scores = _scores(q[rows], k[keys], causal, scale)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _of_all_heads(v[keys], q))
    return out, lse


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.ops.aten._flash_attention_backward`: dq, dk, dv, by the out and lse of all keys, not of these alone."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in _sequences(cu_q, cu_k):
        weights = (_scores(q[rows], k[keys], causal, scale) - lse[:, rows, None]).exp()
        # d scores = p * (dp - sum(dp * p)), of which the sum is grad . out (FlashAttention-2, arXiv 2307.08691).
        dp = torch.einsum("qhd,khd->hqk", grad[rows], _of_all_heads(v[keys], q))
        ds = weights * (dp - (grad[rows] * out[rows]).sum(-1).t()[..., None]) * scale
        dq[rows] += torch.einsum("hqk,khd->qhd", ds, _of_all_heads(k[keys], q))
        dk[keys] += _of_kv_heads(torch.einsum("hqk,qhd->khd", ds, q[rows]), k)
        dv[keys] += _of_kv_heads(torch.einsum("hqk,qhd->khd", weights, grad[rows]), v)
    return dq, dk, dv


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()))]


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[H, queries, keys], -inf where a query does not see a key; in a causal run the last query sees the last key."""
    scores = torch.einsum("qhd,khd->hqk", q, _of_all_heads(k, q)) * scale
    if not causal:
        return scores
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    return scores.masked_fill(~seen, -torch.inf)


def _of_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """[N, Hkv, D] as [N, H, D]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _of_kv_heads(x: Tensor, kv: Tensor) -> Tensor:
    """[N, H, D] summed to [N, Hkv, D]."""
    return x.unflatten(1, (kv.shape[1], -1)).sum(2)
