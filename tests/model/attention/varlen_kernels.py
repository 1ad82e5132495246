"""FlashAttention's variable-length operators on the CPU, by the names that torch gives their arguments.

They stand in where there is no card: a call that swaps two arguments gives other results, or none.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the forward returns first: out [rows, H, D] and lse [H, rows]."""
    assert query.shape[-1] % 8 == 0
    assert query.shape[1] % key.shape[1] == 0  # the CPU's kernel would divide by 0
    assert (dropout_p, return_debug_mask) == (0.0, False)
    parts = []
    for rows, keys in sequences(cum_seq_q, cum_seq_k, max_q, max_k):
        parts.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                batched(query[rows]), batched(key[keys]), batched(value[keys]), 0.0, is_causal, scale=scale
            )
        )
    return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def varlen_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor,
    *, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of `varlen_forward`, from the out and lse given."""
    assert logsumexp.shape == (query.shape[1], len(query))
    assert query.shape[1] % key.shape[1] == 0
    assert dropout_p == 0.0
    assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
    columns: list[list[Any]] = [[], [], []]
    for rows, keys in sequences(cum_seq_q, cum_seq_k, max_q, max_k):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(batched(x) for x in (grad_out[rows], query[rows], key[keys], value[keys], out[rows])),
            logsumexp[None, :, rows].transpose(1, 2).contiguous().transpose(1, 2),
            0.0,
            is_causal,
            scale=scale,
        )
        for column, part in zip(columns, grads):
            column.append(part[0].transpose(0, 1))
    return [torch.cat(column) for column in columns]


def sequences(cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """The rows of queries and of keys of each sequence."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    cut = [[slice(*pair) for pair in pairwise(bounds.tolist())] for bounds in (cum_seq_q, cum_seq_k)]
    assert [max(part.stop - part.start for part in parts) for parts in cut] == [max_q, max_k]
    return list(zip(*cut, strict=True))


def batched(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1)[None]
