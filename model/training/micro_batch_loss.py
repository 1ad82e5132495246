"""One micro-batch forward: this rank's tokens through the decoder once, then the loss of its targets by modality.

In: one rank's share of a packed sequence. Out: the weighted sum to call backward on, and the detached sums from which
any number of ranks and micro-batches report nats per token. Only attention communicates, through `group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from model.llama.config import modality_ranges
from model.llama.loss import CHUNK
from model.training.rank_batch import RankBatch

SUMS = ("weighted", "nll", "targets")
"""Sums over the targets of each modality, and of each source."""


def micro_batch_loss(
    model: LlamaForCausalLM, batch: RankBatch, group: Any = None, chunk: int = CHUNK
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the token losses of this rank, and its sums per modality.

    model: of `model.llama.llama`, with its weights. batch: the rank's share, on the model's device. group: the process
    group of the ranks that share the sequence, None for one rank. chunk: targets whose logits exist at once.

    Returns (local_sum, sums). local_sum: fp32 scalar, sum of loss_weight x nll, connected to every parameter even on a
    rank without targets; the caller divides by the examples of the global batch. sums: of each modality of the model,
    by its name, the detached fp64 scalars "NAME_{weighted,nll,targets}" - weighted nll, plain nll and number of targets
    with loss - which add up over ranks and micro-batches, so nats per token are nll / targets; and the same by source
    of the mixture, the fp64 vectors [n_sources] "source_{weighted,nll,targets}".
    """
    hidden = model.model(
        input_ids=batch.tokens.unsqueeze(0),
        position_ids=batch.positions.unsqueeze(0),
        use_cache=False,
        plan=batch.plan,
        group=group,
    ).last_hidden_state.squeeze(0)
    ranges = modality_ranges(model.config)
    labels, weights = batch.labels, batch.loss_weight
    nll = model.lm_head(hidden, labels=labels.masked_fill(weights == 0, -1), ranges=tuple(ranges.values()), chunk=chunk)
    return (weights * nll).sum(), _sums(nll.detach(), batch, ranges)


class MicroBatchLoss(nn.Module):
    """`micro_batch_loss` as a module's forward, for engines that hook the root module (DeepSpeed ZeRO-3)."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments and result of `micro_batch_loss` after the model."""
        return micro_batch_loss(self.model, *args, **kwargs)


def _sums(nll: Tensor, batch: RankBatch, ranges: Mapping[str, range]) -> dict[str, Tensor]:
    labels, weights = batch.labels, batch.loss_weight
    counted = weights != 0
    # A row of sums a mask, over zeros elsewhere: a selection by a mask would make the host wait for a GPU.
    figures = torch.stack((weights * nll, nll * counted, counted.to(nll.dtype)))

    def where(mask: Tensor) -> Tensor:
        return figures.where(mask, 0).sum(1, dtype=torch.float64)

    sums: dict[str, Tensor] = {}
    for name, ids in ranges.items():
        of_modality = where((labels >= ids.start) & (labels < ids.stop))
        sums |= {f"{name}_{what}": value for what, value in zip(SUMS, of_modality)}
    by_source = torch.stack([where(batch.source == n) for n in range(batch.n_sources)], 1)
    return sums | {f"source_{what}": values for what, values in zip(SUMS, by_source)}
