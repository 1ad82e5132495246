"""From a training engine, at any ZeRO stage, to a plain Hugging Face Llama at a URL, one file of weights at a time.

The same files can be made of any `Weights`: `planned_files` says which there are, `write_weights` and
`described` make them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.checkpoint.snapshot import safetensors_header
from model.llama.hf_weights import CONFIG, FILE_BYTES, INDEX
from model.llama.llama import empty_llama
from model.training.engine import TrainingEngine
from model.training.master_weights import master_weight
from storage.store import Store

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def export_hf(engine: TrainingEngine, target: Store, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors below `target`, loadable by any Llama server. Collective; rank 0 writes.

    The weights are the optimizer's fp32 masters, cast to `dtype`: by default that of the training precision. Rank 0
    holds a file's weights on the host. config.json comes last, so a half-written export cannot be loaded. Raises
    UserError, on every rank, where the disk is full.
    """
    dtype = dtype or stored_dtype(engine.settings.precision)
    llama, files = planned_files(engine.model.config, dtype)
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


def stored_dtype(precision: str) -> torch.dtype:
    """Of the weights that a training of this precision leaves."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def planned_files(config: LlamaConfig, dtype: torch.dtype) -> tuple[LlamaForCausalLM, StateDictSplit]:
    """A model without memory, whose weights are stored so, and which of them are in which file."""
    llama = empty_llama(config, dtype=dtype)
    files = split_torch_state_dict_into_shards(
        llama.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES
    )
    return llama, files


def _clear(target: Store) -> None:
    """Delete the files that would make this export look whole before it is."""
    target.sweep_temporaries()
    for name in (CONFIG, INDEX):
        target.delete(name)


def _put_weights(target: Store, file: str, weights: Mapping[str, Tensor]) -> None:
    shapes = {name: weight.shape for name, weight in weights.items()}
    with target.writing(file) as opened:
        write_weights(opened, shapes, next(iter(weights.values())).dtype, weights.__getitem__)


def write_weights(
    file: BinaryIO, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """As `safetensors.torch.save_file`, which writes only to a local path and holds all tensors at once.

    read: returns the weight of a name, on the host, of any floating dtype.
    """
    ordered = {name: shapes[name] for name in sorted(shapes)}
    file.write(safetensors_header(ordered, _DTYPES[dtype], dtype.itemsize, {"format": "pt"}))
    for name in ordered:
        file.write(read(name).to(dtype).contiguous().view(torch.uint8).numpy().data)


def _put_description(target: Store, llama: LlamaForCausalLM, files: StateDictSplit) -> None:
    for name, content in described(llama, files).items():
        with target.writing(name) as file:
            file.write(content)


def described(llama: LlamaForCausalLM, files: StateDictSplit) -> dict[str, bytes]:
    """The files beside the weights by name: the generation configuration, the index where weights are in several files,
    and last `config.json`.
    """
    with tempfile.TemporaryDirectory() as made:
        llama.config.save_pretrained(made)
        llama.generation_config.save_pretrained(made)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (Path(made) / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        paths = sorted(Path(made).iterdir(), key=lambda path: path.name == CONFIG)
        return {path.name: path.read_bytes() for path in paths}
