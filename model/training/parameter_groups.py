"""A model's parameters as an optimizer sees them, whatever ZeRO-3 has made of them on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from model.training.engine import EngineSettings


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter; once ZeRO-3 has split it, what a rank holds is flat."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def parameter_groups(module: nn.Module, settings: EngineSettings) -> list[dict[str, Any]]:
    """The optimizer's groups: one, or, with `decay` "matrices", a second of the vectors, which do not decay."""
    parameters = list(module.parameters())
    if settings.decay == "all":
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if len(whole_shape(p)) > 1]},
        {"params": [p for p in parameters if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
