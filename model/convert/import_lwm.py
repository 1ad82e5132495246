"""LWM's own weights into a plain Hugging Face Llama over the joint vocabulary.

In: leaves by flax path, from the released checkpoint file (`flax_msgpack.read_leaves`) or an .npz. Out: Llama
weights, written in shards tensor by tensor, so that memory is bounded by one shard whatever the checkpoint's size.

The rules (each verified against the released code of arXiv 2402.08268): kernels are (in, out), so every projection is
transposed; w1, w2, w3 are gate, down, up; LWM turns interleaved pairs (2i, 2i + 1) of a head's dimensions, Llama its
two halves, so the rows of q and k are permuted; layers may be stacked along a first axis (`h/scan_decoder`); the text
and vision tables and heads are joined, text first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from model.convert.flax_msgpack import Leaf, read_leaves
from model.llama.config import llama_config
from storage.errors import UserError

LAYER_NAMES = {
    "attention/wq/kernel": "self_attn.q_proj",
    "attention/wk/kernel": "self_attn.k_proj",
    "attention/wv/kernel": "self_attn.v_proj",
    "attention/wo/kernel": "self_attn.o_proj",
    "feed_forward/w1/kernel": "mlp.gate_proj",
    "feed_forward/w2/kernel": "mlp.down_proj",
    "feed_forward/w3/kernel": "mlp.up_proj",
    "attention_norm/kernel": "input_layernorm",
    "ffn_norm/kernel": "post_attention_layernorm",
}
ROTATED = ("attention/wq/kernel", "attention/wk/kernel")
STACKED = "transformer/h/scan_decoder/"


def open_lwm(path: str | Path) -> dict[str, Leaf]:
    """Leaves of an LWM checkpoint file, or of an .npz whose keys are flax paths joined by "/"."""
    if not str(path).endswith(".npz"):
        return read_leaves(path)
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
    return {
        name: Leaf(
            array.reshape(-1).view(np.uint8).data, array.shape, torch.from_numpy(array).dtype, ((0, array.size),)
        )
        for name, array in arrays.items()
    }


def lwm_config(leaves: Mapping[str, Leaf], heads: int, context: int, rope_theta: float) -> LlamaConfig:
    """Configuration from the arrays' shapes and what shapes do not show: heads, context and theta."""
    try:
        text, width = leaves["transformer/wte/embedding"].shape
        vision = leaves["transformer/vte/embedding"].shape[0] if "transformer/vte/embedding" in leaves else 0
        norm = "attention_norm/kernel"
        unstacked = sum(name.startswith("transformer/h/") and name.endswith(f"/{norm}") for name in leaves)
        layers = leaves[STACKED + norm].shape[0] if STACKED + norm in leaves else unstacked
        inner, keys = (leaves[_leaf_name(leaves, 0, name)].shape[-1] for name in ("feed_forward/w1/kernel", ROTATED[1]))
    except KeyError as missing:
        raise UserError(f"the LWM checkpoint has no leaf {missing}; name a file of model parameters") from missing
    if width % heads or keys % (width // heads):
        raise UserError(f"heads: {heads} does not divide the checkpoint's width {width}; LWM-7B has 32")
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys // (width // heads),
    }
    return llama_config(sizes, {"text": text} | ({"vision": vision} if vision else {}), context, rope_theta)


def llama_tensors(leaves: Mapping[str, Leaf], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """The Llama's weights by Hugging Face name, one at a time, layer by layer, in the leaves' dtype."""
    head_dim = config.hidden_size // config.num_attention_heads
    yield "model.embed_tokens.weight", _joined(leaves, "transformer/wte/embedding", "transformer/vte/embedding", 0)
    for layer in range(config.num_hidden_layers):
        for flax_name, name in LAYER_NAMES.items():
            stacked = STACKED + flax_name in leaves
            weight = leaves[_leaf_name(leaves, layer, flax_name)].read(layer if stacked else None)
            weight = weight.t() if weight.dim() == 2 else weight
            weight = _to_halves(weight, head_dim) if flax_name in ROTATED else weight
            yield f"model.layers.{layer}.{name}.weight", weight
    yield "model.norm.weight", leaves["transformer/ln_f/kernel"].read()
    yield "lm_head.weight", _joined(leaves, "lm_head/kernel", "vision_head/kernel", 1).t()


def convert_lwm(
    source: str | Path,
    target: str | Path,
    heads: int,
    context: int,
    rope_theta: float,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 << 30,
    progress: Callable[[str], Any] = lambda name: None,
) -> LlamaConfig:
    """Write the LWM checkpoint at `source` as a plain Hugging Face checkpoint in the folder `target`.

    heads, context, rope_theta: not in the file (LWM-7B: 32, 1048576, 5e7). dtype: of the weights written,
    the checkpoint's unless given. Memory: a shard of max_shard_bytes and one tensor. progress: called with each
    weight's name. The folder appears whole or not at all. Raises UserError on an unusable source or an existing target.
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target}: already exists; name a new folder for the converted checkpoint")
    leaves = open_lwm(source)
    config = lwm_config(leaves, heads, context, rope_theta)
    config.dtype = dtype or leaves["transformer/wte/embedding"].dtype
    part = target.with_name(target.name + ".part")
    part.mkdir(parents=True)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in llama_tensors(leaves, config):
            progress(name)
            yield name, tensor.to(config.dtype).contiguous()

    _write_shards(part, tensors(), max_shard_bytes)
    config.save_pretrained(part)
    GenerationConfig.from_model_config(config).save_pretrained(part)
    os.rename(part, target)
    return config


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> None:
    """Fill shards up to max_bytes in the order given, then name them as transformers does and write their index."""
    placed: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(placed)}.part", metadata={"format": "pt"})
        placed.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    if len(placed) == 1:
        (folder / "0.part").rename(folder / SAFE_WEIGHTS_NAME)
        return
    files = [f"model-{i + 1:05d}-of-{len(placed):05d}.safetensors" for i in range(len(placed))]
    for i, file in enumerate(files):
        (folder / f"{i}.part").rename(folder / file)
    where = {name: file for names, file in zip(placed, files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _leaf_name(leaves: Mapping[str, Leaf], layer: int, flax_name: str) -> str:
    stacked = STACKED + flax_name
    return stacked if stacked in leaves else f"transformer/h/{layer}/{flax_name}"


def _joined(leaves: Mapping[str, Leaf], text: str, vision: str, axis: int) -> Tensor:
    tables = [leaves[name].read() for name in (text, vision) if name in leaves]
    return torch.cat(tables, dim=axis) if len(tables) > 1 else tables[0]


def _to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, in] of a q or k projection from interleaved pairs to halves."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
