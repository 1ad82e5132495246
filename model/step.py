"""One micro-batch forward: this rank's tokens through the decoder once, then the two-softmax loss of its targets.

In: one rank's share of a packed sequence. Out: the weighted sum to call backward on, and the detached sums from which
any number of ranks and micro-batches report nats per token. Only attention communicates, through `group`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from model.config import text_vocab_size
from model.loss import CHUNK

MODALITIES = ("text", "vision")


def micro_batch_loss(
    model: LlamaForCausalLM,
    tokens: Tensor,
    positions: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    plan: Any,
    group: Any,
    chunk: int = CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the token losses of this rank, and its sums per modality.

    model: from `build_llama` or `load_llama`. tokens, positions, labels: integers [T], the rank's tokens of the packed
    sequence in the plan's order, positions restarting in each document, labels the joint ids to predict. loss_weight:
    [T], each label's weight; 0 means no loss. plan: the `SequencePlan` of the packed sequence; group: the process group
    of the ranks that share it, None for one rank.

    Returns (local_sum, sums). local_sum: fp32 scalar, sum of loss_weight x nll, connected to every parameter even on a
    rank without targets; the caller divides by the examples in the global batch. sums: detached fp64 scalars
    "{text,vision}_{weighted,nll,targets}" - weighted nll, plain nll and number of targets with loss - which add up over
    ranks and micro-batches, so nats per token are nll / targets.
    """
    hidden = model.model(
        input_ids=tokens.long().unsqueeze(0),
        position_ids=positions.long().unsqueeze(0),
        use_cache=False,
        plan=plan,
        group=group,
    ).last_hidden_state.squeeze(0)
    text_size = text_vocab_size(model.config)
    weights = loss_weight.to(torch.float32)
    nll = model.lm_head(hidden, labels=labels.masked_fill(weights == 0, -1), text_size=text_size, chunk=chunk)
    return (weights * nll).sum(), _sums(nll.detach(), labels, weights, text_size)


class MicroBatchLoss(nn.Module):
    """`micro_batch_loss` as a module's forward, for engines that hook the root module (DeepSpeed ZeRO-3)."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments and result of `micro_batch_loss` after the model."""
        return micro_batch_loss(self.model, *args, **kwargs)


def _sums(nll: Tensor, labels: Tensor, weights: Tensor, text_size: int) -> dict[str, Tensor]:
    counted = weights != 0
    sums = {}
    for name, mask in zip(MODALITIES, (counted & (labels < text_size), counted & (labels >= text_size)), strict=True):
        sums[f"{name}_weighted"] = (weights * nll)[mask].sum(dtype=torch.float64)
        sums[f"{name}_nll"] = nll[mask].sum(dtype=torch.float64)
        sums[f"{name}_targets"] = mask.sum(dtype=torch.float64)
    return sums
