"""The fp32 weights that the optimizer steps, whole, at any ZeRO stage."""

from __future__ import annotations

from torch import Tensor, nn

from model.training.engine import TrainingEngine
from model.training.parameter_groups import whole_shape


def master_weight(engine: TrainingEngine, parameter: nn.Parameter) -> Tensor:
    """The fp32 master weight of one of the model's parameters, whole, on every rank's device. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter) if engine.settings.zero else parameter.detach()
    return whole.reshape(whole_shape(parameter))
