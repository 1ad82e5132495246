"""The weights in a Hugging Face checkpoint's safetensors, read one at a time from files that are mapped, not loaded."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from model.llama.initial_weights import EMBEDDINGS, HEAD, Weights, weight_shapes
from storage.errors import UserError

CONFIG = "config.json"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 2 << 30
"""Most bytes of weights in a file that is written, and on rank 0's host meanwhile, unless it holds a larger one."""


class StoredWeights(Weights):
    """The weights of a checkpoint in a folder, as stored; tied tables are read twice.

    config: of `stored_config`. folder: returns the local folder; called once, at the first read or check.
    """

    def __init__(self, config: LlamaConfig, folder: Callable[[], Path]) -> None:
        self.config = copy.deepcopy(config)
        self.config.tie_word_embeddings = False
        self._tied = bool(config.tie_word_embeddings)
        self._folder = functools.cache(folder)

    def check(self) -> None:
        """Raises UserError where a weight is missing or has another shape than config.json says."""
        for name, shape in weight_shapes(self.config).items():
            with self._open(name) as tensors:
                found = tuple(tensors.get_slice(self._stored(name)).get_shape())
            if found != tuple(shape):
                stored, wanted = ("x".join(map(str, sizes)) for sizes in (found, shape))
                raise UserError(
                    f"{self._files[self._stored(name)]}: {name} is {stored}, but {wanted} by {CONFIG}; name the folder "
                    "of a whole checkpoint"
                )

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        with self._open(name) as tensors:
            mapped: Tensor = tensors.get_tensor(self._stored(name))
        return mapped.clone()

    def read_part(self, name: str, dim: int, part: range) -> Tensor:
        """See `Weights`; nothing else is read."""
        with self._open(name) as tensors:
            mapped = tensors.get_slice(self._stored(name))
            rows: Tensor = mapped[part.start : part.stop] if dim == 0 else mapped[:, part.start : part.stop]
        return rows.clone()

    def _stored(self, name: str) -> str:
        return EMBEDDINGS if self._tied and name == HEAD else name

    def _open(self, name: str) -> safe_open:
        if (path := self._files.get(self._stored(name))) is None:
            raise UserError(f"{self._folder()}: {name} is in no file; name the folder of a whole checkpoint")
        return _opened(path)

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each tensor stored."""
        folder = self._folder()
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())
            if outside := [file for file in index["weight_map"].values() if Path(file).name != file]:
                raise UserError(
                    f"{folder / INDEX}: {outside[0]!r} is no file beside it; name the folder of a whole checkpoint"
                )
            return {name: folder / file for name, file in index["weight_map"].items()}
        with _opened(folder / ONE_FILE) as tensors:
            return dict.fromkeys(tensors.keys(), folder / ONE_FILE)


def stored_config(folder: str | Path, context: int | None = None, rope_theta: float | None = None) -> LlamaConfig:
    """The configuration of the checkpoint in a local folder; that of a Mistral without a sliding window is a Llama's.

    context, rope_theta: a training stage's own, which replace those of the stage before and any scaling of positions.
    Raises UserError where there is no such folder or it holds another architecture.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} there; name the folder of a Hugging Face Llama checkpoint")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":
        if config.sliding_window is not None:
            raise UserError(
                f"{path}: sliding_window {config.sliding_window} is not what a Llama does; name a "
                f"checkpoint that attends to all of its context"
            )
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "sliding_window")}
        config = LlamaConfig(**values)
    if config.model_type != "llama":
        raise UserError(f"{path}: model_type {config.model_type!r} is not 'llama'; name a Llama checkpoint")
    config.architectures = ["LlamaForCausalLM"]
    if context is not None:
        config.max_position_embeddings = context
    if rope_theta is not None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    return config


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the folder of a Llama checkpoint in safetensors") from None
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error}); fetch the checkpoint again") from None
