"""From a training engine, at any ZeRO stage, to a plain Hugging Face Llama at a URL, one file of weights at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from model.llama.hf_weights import CONFIG, INDEX
from model.llama.llama import empty_llama
from model.training.engine import TrainingEngine
from model.training.parameter_groups import whole_shape
from storage.folder import Folder

FILE_BYTES = 2 << 30
"""Of weights in a file, at most, unless it holds a single one; so much rank 0 has on the host."""


def export_hf(
    engine: TrainingEngine, url: str, dtype: torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """Write config.json and safetensors below `url`, loadable by any Llama server. Collective; rank 0 writes.

    The weights are the optimizer's fp32 masters, cast to `dtype`: by default that of the training precision. Rank 0
    holds those of a file on the host meanwhile. config.json comes last, so a half-written export cannot be loaded.
    Raises UserError, on every rank, where the disk is full.
    """
    dtype = dtype or (torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32)
    llama, target = empty_llama(engine.model.config, dtype=dtype), Folder(url, options)
    files = split_torch_state_dict_into_shards(
        llama.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES
    )
    parameters = dict(engine.model.named_parameters())
    engine.mesh.agreed(partial(_clear, target))
    for file, names in files.filename_to_tensors.items():
        weights = {}
        for name in names:
            weight = master_weight(engine, parameters[name])
            if engine.mesh.rank == 0:
                weights[name] = weight.to("cpu", dtype, copy=True)
        engine.mesh.agreed(partial(_put_weights, target, file, weights))
    engine.mesh.agreed(partial(_put_description, target, llama, files))


def master_weight(engine: TrainingEngine, parameter: nn.Parameter) -> Tensor:
    """The fp32 master weight of one of the model's parameters, whole, on every rank's device. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter) if engine.settings.zero_stage else parameter.detach()
    return whole.reshape(whole_shape(parameter))


def _clear(target: Folder) -> None:
    """What makes an export whole, and which files it has, is not to be that of one before."""
    target.sweep()
    for name in (CONFIG, INDEX):
        target.delete(name)


def _put_weights(target: Folder, file: str, weights: Mapping[str, Tensor]) -> None:
    with target.workspace() as workspace:
        save_file(dict(weights), workspace / file, metadata={"format": "pt"})
        target.put(workspace / file, file)


def _put_description(target: Folder, llama: LlamaForCausalLM, files: StateDictSplit) -> None:
    with target.workspace() as workspace:
        llama.config.save_pretrained(workspace)
        llama.generation_config.save_pretrained(workspace)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (workspace / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in sorted(workspace.iterdir(), key=lambda path: path.name == CONFIG):
            target.put(path, path.name)
