"""LWM's own weights into a plain Hugging Face Llama over the joint vocabulary.

In: leaves by flax path, from a released checkpoint file (`flax_msgpack.read_leaves`) or an .npz. Out: `Weights`, of
which each is made when it is read, so that memory is that of one weight whatever the checkpoint's size.

The rules (each verified against the released code of arXiv 2402.08268): kernels are (in, out), so every projection is
transposed; w1, w2, w3 are gate, down, up; LWM turns interleaved pairs (2i, 2i + 1) of a head's dimensions, Llama its
two halves, so the rows of q and k are permuted; layers may be stacked along a first axis (`h/scan_decoder`); the text
and vision tables and heads are joined, text first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from model.convert.flax_msgpack import Leaf, read_leaves
from model.convert.lwm_settings import file_of
from model.llama.config import llama_config
from model.llama.initial_weights import EMBEDDINGS, HEAD, Weights, weight_shapes
from storage.errors import UserError

TEXT_EMBEDDINGS = "transformer/wte/embedding"
VISION_EMBEDDINGS = "transformer/vte/embedding"
_TABLES: dict[str, tuple[str, str, int]] = {
    EMBEDDINGS: (TEXT_EMBEDDINGS, VISION_EMBEDDINGS, 0),
    HEAD: ("lm_head/kernel", "vision_head/kernel", 1),
}
"""By name the leaves that are joined, and the axis of their ids."""
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
_FLAX_NAMES = {name: flax_name for flax_name, name in LAYER_NAMES.items()}


def open_lwm(path: str | Path) -> dict[str, Leaf]:
    """Leaves of an LWM checkpoint file, or of an .npz whose keys are flax paths joined by "/".

    Raises UserError where it is neither, or has no parameters of an LWM model.
    """
    if not str(path).endswith(".npz"):
        return read_leaves(path)
    try:
        with np.load(file_of(str(path)), allow_pickle=False) as stored:
            arrays = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
        return {
            name: Leaf(
                array.reshape(-1).view(np.uint8).data, array.shape, torch.from_numpy(array).dtype, ((0, array.size),)
            )
            for name, array in arrays.items()
        }
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no .npz of arrays ({error}); name an LWM checkpoint") from error


def lwm_config(leaves: Mapping[str, Leaf], heads: int, context: int, rope_theta: float, **further: Any) -> LlamaConfig:
    """Configuration from the arrays' shapes and what shapes do not show: heads, context and theta.

    further: of `llama_config` (bos_id, eos_id), and rms_norm_eps. Raises UserError where they do not fit the shapes.
    """
    try:
        text, width = leaves[TEXT_EMBEDDINGS].shape
        vision = leaves[VISION_EMBEDDINGS].shape[0] if VISION_EMBEDDINGS in leaves else 0
        norm = "attention_norm/kernel"
        unstacked = sum(name.startswith("transformer/h/") and name.endswith(f"/{norm}") for name in leaves)
        layers = leaves[STACKED + norm].shape[0] if STACKED + norm in leaves else unstacked
        inner, keys = (leaves[_leaf_name(leaves, 0, name)].shape[-1] for name in ("feed_forward/w1/kernel", ROTATED[1]))
    except KeyError as missing:
        raise UserError(f"the LWM checkpoint has no leaf {missing}; name a file of model parameters") from missing
    except (ValueError, IndexError):
        raise UserError("the LWM checkpoint's leaves have other axes than a model's; name a file of LWM's") from None
    if heads < 1 or width % heads or keys % (width // heads):
        raise UserError(f"heads: {heads} does not divide the checkpoint's width {width}; LWM-7B has 32")
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys // (width // heads),
    }
    if "rms_norm_eps" in further:
        sizes["rms_norm_eps"] = further.pop("rms_norm_eps")
    ids = {"text": text} | ({"vision": vision} if vision else {})
    return llama_config(sizes, ids, context, rope_theta, **further)


class LWMWeights(Weights):
    """The weights of an LWM checkpoint as a Llama's, each made of its leaves when it is read.

    config: of `lwm_config`, or one of the same sizes.
    """

    def __init__(self, leaves: Mapping[str, Leaf], config: LlamaConfig) -> None:
        self.config, self._leaves = config, leaves
        self._head_dim = config.head_dim or config.hidden_size // config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """In which the checkpoint has them."""
        return self._leaves[TEXT_EMBEDDINGS].dtype

    def check(self) -> None:
        """Raises UserError where a leaf is missing or has another shape than the model needs."""
        for name, shape in weight_shapes(self.config).items():
            found = self._shape(name)
            if found != tuple(shape):
                stored, wanted = ("x".join(map(str, sizes)) for sizes in (found, shape))
                raise UserError(
                    f"the LWM checkpoint's {name} is {stored}, but {wanted} by the configuration; give the one with "
                    f"which it was trained"
                )

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        if name in _TABLES:
            *paths, axis = _TABLES[name]
            tables = [self._leaves[path].read() for path in paths if path in self._leaves]
            table = torch.cat(tables, dim=axis) if len(tables) > 1 else tables[0]
            return table if axis == 0 else table.t()
        path, layer = self._place(name)
        weight = self._leaves[path].read(layer)
        weight = weight.t() if weight.dim() == 2 else weight
        return _to_halves(weight, self._head_dim) if path.endswith(ROTATED) else weight

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            if name in _TABLES:
                *paths, axis = _TABLES[name]
                shapes = [self._leaves[path].shape for path in paths if path in self._leaves]
                rows = sum(shape[axis] for shape in shapes)
                return rows, shapes[0][1 - axis]
            path, layer = self._place(name)
            shape = self._leaves[path].shape
        except (KeyError, IndexError):
            raise UserError(f"the LWM checkpoint has no {name}; name a whole file of model parameters") from None
        return tuple(reversed(shape if layer is None else shape[1:]))

    def _place(self, name: str) -> tuple[str, int | None]:
        """The leaf of a weight of a layer, or of the last norm, and the layer where it is stacked."""
        if name == "model.norm.weight":
            return "transformer/ln_f/kernel", None
        _, _, number, own = name.removesuffix(".weight").split(".", 3)
        flax_name = _FLAX_NAMES[own]
        if STACKED + flax_name in self._leaves:
            return STACKED + flax_name, int(number)
        return f"transformer/h/{number}/{flax_name}", None


def _leaf_name(leaves: Mapping[str, Leaf], layer: int, flax_name: str) -> str:
    stacked = STACKED + flax_name
    return stacked if stacked in leaves else f"transformer/h/{layer}/{flax_name}"


def _to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, in] of a q or k projection from interleaved pairs to halves."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
