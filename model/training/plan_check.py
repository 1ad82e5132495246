"""Whether the ranks that share a sequence made the same plan of it: each plans by itself, and none tells another.

Ranks whose plans differ would wait for messages that nobody sends. So before a batch they gather a few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from model.attention.plan.sequence_plan import SequencePlan


def check_same_plans(plans: Sequence[SequencePlan], group: dist.ProcessGroup) -> None:
    """Raise RuntimeError, on every rank of the group, where the plans of a batch differ. One small collective.

    plans: of the batch's micro-batches. The error names the micro-batch, the first rank that differs from the group's
    first, and in what.
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor([list(plan.fingerprint.values()) for plan in plans], dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    differs = (torch.stack(every) != every[0]).nonzero().tolist()
    if differs:
        rank, number, part = differs[0]
        first, other = (dist.get_global_rank(group, one) for one in (0, rank))
        raise RuntimeError(
            f"ranks {first} and {other} share a sequence, but planned micro-batch {number} with different "
            f"{list(plans[0].fingerprint)[part]}: their loaders read different batches, or their settings differ"
        )
