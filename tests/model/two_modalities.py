"""The loss and its sums as they were when there were two modalities alone: text before `text_size`, vision after it.

A reference for what must not change by a bit. It is independent of ranges and names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.rank_batch import RankBatch


class TwoSoftmaxes(torch.autograd.Function):
    """Negative log-likelihood [T] of labels [T] for hidden [T, D] and a head [V, D]; a negative label has none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, text_size: int, chunk: int) -> Tensor:
        labels = labels.long()
        exact = torch.promote_types(weight.dtype, torch.float32)
        nll = hidden.new_zeros(len(labels), dtype=exact)
        lse = torch.zeros_like(nll)
        for rows, first, last in _chunks(labels, text_size, len(weight), chunk):
            logits = F.linear(hidden[rows], weight[first:last]).to(exact)
            lse[rows] = torch.logsumexp(logits, dim=-1)
            nll[rows] = lse[rows] - logits.gather(1, labels[rows, None] - first).squeeze(1)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.text_size, ctx.chunk = text_size, chunk
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=lse.dtype)
        for rows, first, last in _chunks(labels, ctx.text_size, len(weight), ctx.chunk):
            some, table = hidden[rows], weight[first:last]
            grad = F.linear(some, table).to(lse.dtype).sub_(lse[rows, None]).exp_()
            grad.scatter_add_(1, labels[rows, None] - first, grad.new_full((len(rows), 1), -1.0))
            grad = grad.mul_(grad_nll[rows, None]).to(weight.dtype)
            grad_hidden[rows] = grad @ table
            if grad.dtype == grad_weight.dtype:
                grad_weight[first:last].addmm_(grad.t(), some)
            else:
                grad_weight[first:last] += grad.t() @ some
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(labels: Tensor, text_size: int, vocab_size: int, chunk: int) -> list[tuple[Tensor, int, int]]:
    text = ((labels >= 0) & (labels < text_size)).nonzero().squeeze(1)
    vision = (labels >= text_size).nonzero().squeeze(1)
    spans = ((text, 0, text_size), (vision, text_size, vocab_size))
    return [(rows, first, last) for ids, first, last in spans if len(ids) for rows in ids.split(chunk)]


def two_sums(nll: Tensor, batch: RankBatch, text_size: int) -> dict[str, Tensor]:
    """fp64 scalars "{text,vision}_{weighted,nll,targets}" of a micro-batch."""
    labels, weights = batch.labels, batch.loss_weight
    counted = weights != 0
    sums = {}
    for name, mask in (("text", counted & (labels < text_size)), ("vision", counted & (labels >= text_size))):
        sums[f"{name}_weighted"] = (weights * nll)[mask].sum(dtype=torch.float64)
        sums[f"{name}_nll"] = nll[mask].sum(dtype=torch.float64)
        sums[f"{name}_targets"] = mask.sum(dtype=torch.float64)
    return sums
