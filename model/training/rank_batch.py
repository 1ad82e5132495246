"""Dispatch: from a micro-batch of packed documents to one rank's share of it, on the host.

In: a `MicroBatch`, alike on every rank that shares it. Out: a `RankBatch`: the rank's tokens, targets and weights, and
the plan with the rank's own part derived. A loader's thread makes it ahead of the step that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.attention.flash_kernels import CallBounds, pinned
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.options import Route
from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from tokenization.loader.batch import MicroBatch

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True, eq=False)
class RankBatch:
    """One rank's share of a micro-batch, in the order of `plan.indices(rank)`.

    tokens, positions, labels: int64 [T], positions restarting in each document, labels the joint ids to predict.
    loss_weight: float32 [T], each label's weight, 0 for no loss. plan: of the whole packed sequence. source: int16 [T],
    the source of each token out of `n_sources`, -1 in padding. useful_tokens: those that are not padding. useful_pairs:
    1 / sp of the pairs of a query and a key in the sequence's documents. bounds: of the plan's kernel calls here.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    loss_weight: Tensor
    plan: SequencePlan
    source: Tensor
    n_sources: int
    useful_tokens: int
    useful_pairs: float
    bounds: CallBounds

    def to(self, device: torch.device | str) -> RankBatch:
        """The same with its tensors, and those of the plan's kernel calls, on `device`; the host does not wait."""
        self.bounds.to(device)
        names = ("tokens", "positions", "labels", "loss_weight", "source")
        on_gpu = torch.device(device).type == "cuda"
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=on_gpu) for name in names})


def rank_batch(batch: MicroBatch, plan: SequencePlan, rank: int = 0, n_sources: int = 1) -> RankBatch:
    """The share of `rank` by a plan of the micro-batch's documents; CPU tensors that own their memory.

    Everything a step needs of the plan is derived here, in a loader's thread, and pinned where the process uses a GPU.
    """
    mine = plan.indices(rank)
    plan.fingerprint  # noqa: B018 - remembered by the plan

    source = np.zeros(len(batch.tokens), np.int16) if batch.source is None else batch.source
    lengths = np.diff(plan.cu_seqlens)[source[plan.cu_seqlens[:-1]] >= 0]

    def share(values: np.ndarray, dtype: type) -> Tensor:
        return pinned(torch.from_numpy(values[mine].astype(dtype, copy=False)))

    return RankBatch(
        share(batch.tokens, np.int64),
        share(plan.positions, np.int64),
        share(batch.labels, np.int64),
        share(batch.loss_weight, np.float32),
        plan,
        share(source, np.int16),
        n_sources,
        int((source[mine] >= 0).sum()),
        int((lengths * (lengths + 1) // 2).sum()) / plan.sp,
        CallBounds(plan.rank(rank)),
    )


def attention_shape(config: LlamaConfig, precision: str) -> AttentionShape:
    """The shape of a Llama's attention layers for the planner; precision: "fp32" or "bf16", of their activations."""
    from model.llama.config import attention_sizes  # imported late: with transformers it takes over a second

    return AttentionShape(*attention_sizes(config), itemsize=2 if precision == "bf16" else 4)


@dataclass(frozen=True)
class Dispatcher:
    """Plans micro-batches over `sp` ranks and takes out the share of one, `sp_rank`.

    shape, hardware: what the planner models time with. layout, ulysses, route: narrow its choice. n_sources: of the
    mixture. Ranks whose dispatchers differ in `sp_rank` alone make the same plans.
    """

    sp: int = 1
    sp_rank: int = 0
    shape: AttentionShape | None = None
    hardware: Hardware | None = None
    layout: str | None = None
    ulysses: int | None = None
    route: Route | None = None
    n_sources: int = 1

    def __call__(self, batch: MicroBatch) -> RankBatch:
        """The rank's share. Raises ValueError where `plan_sequence` does."""
        plan = plan_sequence(
            batch.cu_seqlens, self.sp, self.layout, self.ulysses, self.route, self.shape, self.hardware
        )
        return rank_batch(batch, plan, self.sp_rank, self.n_sources)


def check_same_plans(plans: Sequence[SequencePlan], group: dist.ProcessGroup) -> None:
    """Raise RuntimeError, on every rank of the group, where its ranks planned a batch's micro-batches differently.

    Ranks whose plans differ would wait for messages that are never sent. One small collective. The error names the
    micro-batch, the first rank that differs from the group's first, and in what.
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor([list(plan.fingerprint.values()) for plan in plans], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    differs = (torch.stack(every) != every[0]).nonzero().tolist()
    if differs:
        rank, micro_batch, part = differs[0]
        first, other = (dist.get_global_rank(group, number) for number in (0, rank))
        raise RuntimeError(
            f"ranks {first} and {other} share a sequence, but planned micro-batch {micro_batch} with different "
            f"{list(plans[0].fingerprint)[part]}: their loaders read different batches, or their settings differ"
        )
