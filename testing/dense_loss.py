"""The loss by its definition, in fp64: all logits at once, and cross entropy over the ids of a label's own modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_nll(hidden: Tensor, head_weight: Tensor, labels: Tensor, ranges: Sequence[range]) -> Tensor:
    """Negative log-likelihood fp64 [T] of labels [T] within their own modality, 0 where a label is negative.

    hidden [T, D], head_weight [V, D]; ranges: the ids of each modality. Differentiable in both.
    """
    logits = hidden.double() @ head_weight.double().t()
    nll = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for ids in ranges:
        rows = (labels >= ids.start) & (labels < ids.stop)
        of_modality = logits[rows, ids.start : ids.stop]
        nll[rows] = F.cross_entropy(of_modality, labels[rows] - ids.start, reduction="none")
    return nll
