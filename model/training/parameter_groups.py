"""A model's parameters by optimizer group, also where ZeRO-3 has split them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.training.settings import Decay


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, of which a rank holds a flat part at ZeRO-3."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def parameter_groups(module: nn.Module, decay: Decay) -> list[dict[str, Any]]:
    """The optimizer's groups: one, or, with "matrices", a second of the vectors, which do not decay."""
    parameters = list(module.parameters())
    if decay == "all":
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if len(whole_shape(p)) > 1]},
        {"params": [p for p in parameters if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
