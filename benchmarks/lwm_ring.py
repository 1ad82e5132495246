"""Attention as the released LWM does it, to measure beside ours: a ring that skips nothing.

In: a rank's contiguous chunk of the sequence. Out: its rows of the output and of the gradients. Keys go once around the
ring, and every hop is computed for every pair; causality and document borders are a mask (arXiv 2310.01889,
2402.08268). The kernel is the one of our engine, which a mask slows by 4 to 11%; building the masks is counted for
nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.attention.p2p import Exchange
from model.attention.plan.sequence_plan import SequencePlan

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class LwmRing:
    """One rank of the ring. plan: of the contiguous layout."""

    def __init__(self, exchange: Exchange, plan: SequencePlan) -> None:
        self.exchange = exchange
        rank, size = exchange.rank, exchange.size
        rows, documents = plan.indices(rank), plan.cu_seqlens
        self.masks = []  # float [T, T] by hop: the hop's keys come from rank - hop
        for hop in range(size):
            keys = plan.indices((rank - hop) % size)
            first = documents[np.searchsorted(documents, rows, side="right") - 1]  # of each query's document
            unseen = torch.from_numpy((keys > rows[:, None]) | (keys < first[:, None]))
            self.masks.append(torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf))

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        """[out, dq, dk, dv] from fp32 q, grad [T, H, D] and k, v [T, Hkv, D]."""
        q, k, v, grad = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v, grad))  # [1, H, T, D]
        out, lse = torch.zeros_like(q[0]), torch.full_like(q[0, ..., 0], -torch.inf)
        keys = torch.stack((k, v))
        for hop, mask in enumerate(self.masks):
            keys = self._pass_on(keys) if hop else keys
            block_out, block_lse = _forward(q, *keys, 0.0, False, attn_mask=mask[None, None])
            # A query that sees nothing of this block reports 0 where -inf is meant.
            block_lse = block_lse[0].masked_fill((mask == -torch.inf).all(dim=1), -torch.inf)
            total = torch.logaddexp(lse, block_lse)
            out = out * (lse - total).exp()[..., None] + block_out[0] * (block_lse - total).exp()[..., None]
            lse = total
        # Keys travel once more with their gradients, which come home after the last hop.
        keys, grads, dq = torch.stack((k, v)), torch.zeros_like(keys), torch.zeros_like(q)
        for hop, mask in enumerate(self.masks):
            if hop:
                keys, grads = self._pass_on(keys), self._pass_on(grads)
            parts = _backward(grad, q, *keys, out[None], lse[None], 0.0, False, attn_mask=mask[None, None])
            dq += parts[0]
            grads += torch.stack(parts[1:])
        grads = self._pass_on(grads)
        return [x.transpose(0, 1) for x in (out, dq[0], grads[0, 0], grads[1, 0])]

    def _pass_on(self, x: Tensor) -> Tensor:
        """To the rank ahead, for what comes from the rank behind."""
        rank, size = self.exchange.rank, self.exchange.size
        if size == 1:
            return x
        received = torch.empty_like(x)
        self.exchange.start({(rank + 1) % size: x}, {(rank - 1) % size: received}).wait()
        return received
