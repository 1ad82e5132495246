"""The loss, one softmax a modality, in chunks: text targets compete with text ids only, vision targets with vision ids.

LWM has two heads; here the head is one table [V, D] with a range of rows for each modality. The T x V logits (168 GB at
a million tokens of the 7B) never exist: a chunk's logits, fp32 over one modality's ids, are reduced to logsumexp and
target logit, and computed again in the backward. A batch without targets of a modality never touches its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.layers.tiled_mlp import add_product_
from model.training.settings import TrainingSettings

CHUNK = TrainingSettings.loss_chunk
"""Targets a chunk: 128 MB of fp32 logits over 32,000 text ids."""


def token_nll(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, ranges: Sequence[range], chunk: int = CHUNK
) -> Tensor:
    """Negative log-likelihood of each label within its own modality, in nats.

    hidden: [T, D], final hidden states. head_weight: [V, D]. labels: integers [T] of the joint vocabulary; a negative
    label has no loss and costs nothing. ranges: the ids of each modality, together all V. Returns [T], 0 where there is
    no label, in fp32 (fp64 for fp64 weights). Differentiable once in hidden and head_weight, with sums over chunks in
    that dtype. Works in autocast's dtype where that is on, else in the head's.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} are not [T, D] and [T]")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
    with torch.autocast(device, enabled=False):
        return _ChunkedNLL.apply(hidden.to(dtype), head_weight.to(dtype), labels, ranges, chunk)


class LossHead(nn.Linear):
    """A Llama's `lm_head` that also computes the loss, so that ZeRO-3 gathers its weight for this module call.

    `head(hidden)` are logits; `head(hidden, labels, ranges)` are `token_nll`'s nats, [T].
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> LossHead:
        """The same head around the same parameter."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        return head

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, ranges: Sequence[range] = (), chunk: int = CHUNK
    ) -> Tensor:
        """Logits [..., V] without labels; with labels [T] the nats of hidden [T, D]."""
        if labels is None:
            return super().forward(hidden)
        return token_nll(hidden, self.weight, labels, ranges, chunk)


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ranges: Sequence[range], chunk: int
    ) -> Tensor:
        labels = labels.long()
        exact = torch.promote_types(weight.dtype, torch.float32)
        nll = hidden.new_zeros(len(labels), dtype=exact)
        lse = torch.zeros_like(nll)
        chunks = _chunks(labels, ranges, chunk)
        for rows, ids in chunks:
            logits = F.linear(hidden[rows], weight[ids.start : ids.stop]).to(exact)
            lse[rows] = torch.logsumexp(logits, dim=-1)
            nll[rows] = lse[rows] - logits.gather(1, labels[rows, None] - ids.start).squeeze(1)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.chunks = chunks  # found once: their number makes the host wait for a GPU
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for rows, ids in ctx.chunks:
            some, table = hidden[rows], weight[ids.start : ids.stop]
            # d nll / d logits = softmax - onehot, written over the chunk's only fp32 buffer.
            grad = F.linear(some, table).to(lse.dtype).sub_(lse[rows, None]).exp_()
            grad.scatter_add_(1, labels[rows, None] - ids.start, grad.new_full((len(rows), 1), -1.0))
            grad = grad.mul_(grad_nll[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ table
            if grad_weight is not None:
                add_product_(grad_weight[ids.start : ids.stop], grad, some)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(labels: Tensor, ranges: Sequence[range], chunk: int) -> list[tuple[Tensor, range]]:
    """(rows, ids) of each chunk: rows whose labels lie in one modality's ids, in order."""
    chunks: list[tuple[Tensor, range]] = []
    for ids in ranges:
        rows = ((labels >= ids.start) & (labels < ids.stop)).nonzero().squeeze(1)
        chunks += [(some, ids) for some in rows.split(chunk) if len(some)]
    return chunks
