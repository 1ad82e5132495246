"""From a training engine, at any ZeRO stage, to a plain Hugging Face Llama at a URL, one file of weights at a time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor
from transformers import LlamaForCausalLM

from model.checkpoint.snapshot import safetensors_header
from model.llama.hf_weights import CONFIG, INDEX
from model.llama.llama import empty_llama
from model.training.engine import TrainingEngine
from model.training.master_weights import master_weight
from storage.store import Store

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FILE_BYTES = 2 << 30
"""Most bytes of weights in a file, and on rank 0's host meanwhile, unless it holds a single larger one."""


def export_hf(engine: TrainingEngine, target: Store, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors below `target`, loadable by any Llama server. Collective; rank 0 writes.

    The weights are the optimizer's fp32 masters, cast to `dtype`: by default that of the training precision. Rank 0
    holds a file's weights on the host. config.json comes last, so a half-written export cannot be loaded. Raises
    UserError, on every rank, where the disk is full.
    """
    dtype = dtype or (torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32)
    llama = empty_llama(engine.model.config, dtype=dtype)
    files = split_torch_state_dict_into_shards(
        llama.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES
    )
    parameters = dict(engine.model.named_parameters())
    engine.mesh.on_rank_zero(partial(_clear, target))
    for file, names in files.filename_to_tensors.items():
        weights = {}
        for name in names:
            weight = master_weight(engine, parameters[name])
            if engine.mesh.rank == 0:
                weights[name] = weight.to("cpu", dtype, copy=True)
        engine.mesh.on_rank_zero(partial(_put_weights, target, file, weights))
    engine.mesh.on_rank_zero(partial(_put_description, target, llama, files))


def _clear(target: Store) -> None:
    """Delete the files that would make this export look whole before it is."""
    target.sweep_temporaries()
    for name in (CONFIG, INDEX):
        target.delete(name)


def _put_weights(target: Store, file: str, weights: Mapping[str, Tensor]) -> None:
    """As `safetensors.torch.save_file`, which writes only to a local path."""
    shapes = {name: weights[name].shape for name in sorted(weights)}
    dtype = next(iter(weights.values())).dtype
    with target.writing(file) as opened:
        opened.write(safetensors_header(shapes, _DTYPES[dtype], dtype.itemsize, {"format": "pt"}))
        for name in shapes:
            opened.write(weights[name].contiguous().view(torch.uint8).numpy().data)


def _put_description(target: Store, llama: LlamaForCausalLM, files: StateDictSplit) -> None:
    with tempfile.TemporaryDirectory() as made:
        llama.config.save_pretrained(made)
        llama.generation_config.save_pretrained(made)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (Path(made) / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in sorted(Path(made).iterdir(), key=lambda path: path.name == CONFIG):
            with target.writing(path.name) as file, path.open("rb") as source:
                shutil.copyfileobj(source, file)
