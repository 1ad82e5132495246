"""A checkpoint's fp32 master weights as whole tensors, read one at a time, without an engine or a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from model.checkpoint.loader import copies, fill
from model.checkpoint.manifest import DamagedError, Manifest, Range, read_manifest, step_name
from model.checkpoint.zero_state import WEIGHT, Fragment
from model.llama.initial_weights import Weights
from storage.store import Store

CONFIG = "config"
"""The key of the model's configuration in a checkpoint's client state."""


class CheckpointWeights(Weights):
    """The weights of the committed checkpoint of a step below `root`, of a model of this configuration.

    Every byte read is compared with the committed hashes. Raises `DamagedError` where the checkpoint has no readable
    `COMMIT`; `read` raises it where a file is not what was written.
    """

    def __init__(self, root: Store, step: int, config: LlamaConfig) -> None:
        self.config = config
        self._folder = root.at(step_name(step))
        self._manifest = manifest_of(root, step)

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        shape, _ = self._manifest.parameters[name]
        weight = torch.empty(shape, dtype=torch.float32)
        whole = Range(name, 0, weight.numel())
        fragment = Fragment(whole, {WEIGHT: weight.view(-1)})
        try:
            plan = copies([whole], self._manifest.files)
        except ValueError as error:
            raise DamagedError(self._folder.path(), str(error)) from error
        for file, wanted in plan.items():
            fill([fragment], wanted, (WEIGHT,), self._folder, file, self._manifest.files[file])
        return weight


def manifest_of(root: Store, step: int) -> Manifest:
    """What was committed of a step. Raises `DamagedError` where it cannot be read."""
    try:
        return read_manifest(root, step)
    except FileNotFoundError:
        raise DamagedError(root.path(step_name(step)), "it has no COMMIT") from None
    except ValueError as error:
        raise DamagedError(root.path(step_name(step)), str(error)) from error


def stored_model(manifest: Manifest) -> LlamaConfig | None:
    """The model's configuration, as the client state has it; None in checkpoints of earlier versions."""
    plain: dict[str, Any] | None = manifest.client_state.get(CONFIG)
    return None if plain is None else LlamaConfig.from_dict(plain)
