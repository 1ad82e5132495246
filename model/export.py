"""From a training engine, at any ZeRO stage, to a plain Hugging Face Llama at a URL."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaForCausalLM

from model.engine import TrainingEngine
from model.folder import Folder
from model.llama import save_llama

_LAST = "config.json"


def export_hf(
    engine: TrainingEngine, url: str, dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """Write config.json and safetensors below `url`, loadable by any Llama server. Collective; rank 0 writes.

    The weights are the optimizer's fp32 masters, cast to `dtype`: by default that of the training precision. Rank 0
    holds the whole model on the host meanwhile. config.json comes last, so a half-written export cannot be loaded.
    Raises UserError, on every rank, where the disk is full.
    """
    dtype = dtype or (torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32)
    weights = whole_weights(engine, dtype)

    def write() -> None:
        if weights is None:
            return
        with torch.device("meta"):
            llama = LlamaForCausalLM._from_config(copy.deepcopy(engine.model.config), dtype=dtype)
        llama.load_state_dict(weights, assign=True)
        target = Folder(url, options)
        target.sweep()
        target.delete(_LAST)
        with target.workspace() as workspace:
            save_llama(llama, workspace)
            for path in sorted(workspace.iterdir(), key=lambda path: path.name == _LAST):
                target.put(path, path.name)

    engine.mesh.together(write)


def whole_weights(engine: TrainingEngine, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor] | None:
    """All weights by their Hugging Face names, on rank 0's host; None on other ranks. Collective, weight by weight."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.model.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if engine.settings.zero_stage else parameter.detach()
        if engine.mesh.rank == 0:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            weights[name] = whole.reshape(shape).to("cpu", dtype, copy=True)
    return weights if engine.mesh.rank == 0 else None
