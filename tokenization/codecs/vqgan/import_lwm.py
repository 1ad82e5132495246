"""LWM's released VQGAN weights to diffusers' `VQModel`, without running code from the file.

In: the released pickle of nested dicts of numpy arrays, or an `.npz` with the same leaves under "/"-joined names. A
pickle is a program, so this reader allows only the numpy functions that rebuild an array. Out: a `VQGAN`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.errors import UserError
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan

# The names in numpy's own pickles. None runs code from its arguments: the first two build an array from bytes, the
# third a scalar.
_ARRAY_BUILDERS = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        current = module.replace("numpy.core.", "numpy._core.")  # its name before numpy 2.0
        if (current, name) not in _ARRAY_BUILDERS:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, and only numpy arrays may be in it")
        return super().find_class(current, name)


def read_lwm_parameters(path: str | Path) -> dict[str, np.ndarray]:
    """Parameters of an LWM VQGAN file, named by their flax paths joined with "/".

    `path` is the released pickle or an `.npz`. Raises UserError if it is missing, neither of the two, or a pickle of
    anything but dicts of float arrays; nothing in the file is executed.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        with path.open("rb") as file:
            tree = _ArrayUnpickler(file).load()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"vqgan weights {path}: {reason}; name a readable file in vqgan.weights") from error
    except Exception as error:  # a hostile or damaged pickle can raise any exception
        reason = f"no LWM VQGAN file ({error})"
        raise UserError(f"vqgan weights {path}: {reason}; name the released pickle or an .npz") from error
    return dict(_leaves(tree, "", path))


def _leaves(node: Any, prefix: str, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            # Flax wraps a model's parameters in one more dict when they are saved beside other collections.
            inner = prefix if not prefix and name == "params" else f"{prefix}/{name}".lstrip("/")
            yield from _leaves(child, inner, path)
    elif isinstance(node, np.ndarray) and node.dtype.kind == "f":
        yield prefix, node
    else:
        where = prefix or "top level"
        raise UserError(f"vqgan weights {path}: {where} holds a {type(node).__name__}, not an array of floats")


_BLOCKS = (
    (r"^(quant_conv|post_quant_conv)", r"\1"),
    (r"^quantize/embeddings$", "quantize.embedding.weight"),
    (r"^(encoder|decoder)/Conv_0", r"\1.conv_in"),
    (r"^(encoder|decoder)/Conv_1", r"\1.conv_out"),
    (r"^(encoder|decoder)/GroupNorm_0", r"\1.conv_norm_out"),
    (r"^(encoder|decoder)/MidBlock_0", r"\1.mid_block"),
    (r"^encoder/DownsamplingBlock_(\d+)", r"encoder.down_blocks.\1"),
    (r"^decoder/UpsamplingBlock_(\d+)", r"decoder.up_blocks.\1"),
    (r"/Downsample_0/Conv_0", ".downsamplers.0.conv"),
    (r"/Upsample_0/Conv_0", ".upsamplers.0.conv"),
    (r"/ResnetBlock_(\d+)", r".resnets.\1"),
    (r"/Conv_([01])", lambda found: f".conv{int(found[1]) + 1}"),
    (r"/Conv_2", ".conv_shortcut"),
    (r"/GroupNorm_([01])", lambda found: f".norm{int(found[1]) + 1}"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)


def diffusers_name(flax_name: str) -> str:
    """The state-dict name in diffusers' `VQModel` of a parameter of LWM's VQGAN."""
    name = flax_name
    for pattern, replacement in _BLOCKS:
        name = re.sub(pattern, replacement, name)
    return name


def config_of_parameters(parameters: Mapping[str, np.ndarray], resolution: int) -> VQGANConfig:
    """The sizes in the parameters' shapes, which do not include the resolution. Raises UserError on a missing part."""
    names = "\n".join(parameters)
    levels = len(set(re.findall(r"^encoder/DownsamplingBlock_(\d+)/", names, re.M)))
    blocks = len(set(re.findall(r"^encoder/DownsamplingBlock_0/ResnetBlock_(\d+)/", names, re.M)))
    first = "encoder/DownsamplingBlock_{}/ResnetBlock_0/Conv_0/kernel"
    try:
        channels = tuple(parameters[first.format(level)].shape[-1] for level in range(max(levels, 1)))
        latent_channels, embed_dim = parameters["quant_conv/kernel"].shape[-2:]
        codebook_size = len(parameters["quantize/embeddings"])
    except (KeyError, ValueError) as error:
        reason = f"no LWM VQGAN, it lacks {error}"
        raise UserError(f"vqgan weights: {reason}; name the released file in vqgan.weights") from error
    return VQGANConfig(
        resolution=resolution,
        channels=channels,
        res_blocks=blocks,
        latent_channels=latent_channels,
        embed_dim=embed_dim,
        codebook_size=codebook_size,
    )


def load_lwm_vqgan(path: str | Path, resolution: int = 256, **compute: Any) -> VQGAN:
    """LWM's VQGAN from its released file, ready to encode; `compute` as in `VQGAN`. Raises UserError on other files."""
    parameters = read_lwm_parameters(path)
    model: Any = build_vqgan(config_of_parameters(parameters, resolution))
    state = {}
    for name, value in parameters.items():  # kernels of convolutions (h, w, in, out) become (out, in, h, w)
        layout = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        state[diffusers_name(name)] = torch.from_numpy(np.array(layout, dtype=np.float32, order="C"))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise UserError(f"vqgan weights {path}: not LWM's VQGAN: {reason}") from error
    return VQGAN(model, **compute)
