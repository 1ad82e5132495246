"""A model's first weights, read one at a time, so that no process holds them all.

In: a configuration and a seed, or weights that lack the rows of a modality. Out: `Weights`, which reads each tensor by
its Hugging Face name. Those of a checkpoint's files are in `model.llama.hf_weights`.
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.llama.config import modality_ranges
from storage.errors import UserError

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Weights(Protocol):
    """The weights of a Llama of `config`, which has tables of their own for embeddings and head."""

    config: LlamaConfig

    def check(self) -> None:
        """Raise UserError where any weight cannot be read, before the first is; by default all can."""
        return

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The weight of this name, in any floating dtype, in host memory that the caller then owns."""

    def read_part(self, name: str, dim: int, part: range) -> Tensor:
        """The rows (dim 0) or columns (dim 1) `part` of a matrix; by default all of it is read, and that is cut out."""
        return self.read(name).narrow(dim, part.start, len(part)).clone()


def weight_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Shape of every weight by name, in the model's order."""
    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class RandomWeights(Weights):
    """Fresh weights in fp32, each a function of the seed, its name and its shape alone.

    Matrices are normal by the configuration's `initializer_range`, norms are 1, as in transformers.
    """

    def __init__(self, config: LlamaConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._shapes = weight_shapes(config)

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(std=self.config.initializer_range, generator=generator)


class BlankWeights(Weights):
    """Zeros, in fp32: for an engine into which a checkpoint will be loaded."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._shapes = weight_shapes(config)

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        return torch.zeros(self._shapes[name])


@dataclass
class _Joined(Weights):
    config: LlamaConfig
    trained: Weights
    n_trained: int
    fresh: RandomWeights

    def check(self) -> None:
        self.trained.check()

    def read(self, name: str) -> Tensor:
        if name not in (EMBEDDINGS, HEAD):
            return self.trained.read(name)
        table = self.fresh.read(name)
        table[: self.n_trained] = self.trained.read(name)[: self.n_trained]
        return table


def join_modalities(weights: Weights, sizes: Mapping[str, int], seed: int) -> Weights:
    """Append rows for the modalities that a model lacks, drawn like fresh weights, to its table and head.

    sizes: ids of each modality of the joint vocabulary, by name in the order of their ranges. Rows of a text model
    beyond its text ids, which pad its tables to a round number, are dropped. Weights that have all rows are returned as
    they are. Raises UserError where the model has another number of ids of a modality, or has them elsewhere.
    """
    config = weights.config
    known = {name: len(ids) for name, ids in modality_ranges(config).items()}
    if len(known) == 1:
        known["text"] = min(known["text"], sizes["text"])
    if known["text"] != sizes["text"]:
        raise UserError(
            f"the checkpoint has {known['text']} text ids, the text tokenizer {sizes['text']}: set text_tokenizer.path "
            f"to the checkpoint's own"
        )
    for name, n_ids in known.items():
        if n_ids != sizes.get(name, 0):
            raise UserError(
                f"the checkpoint has {n_ids} {name} ids, the recipe {sizes.get(name, 0)}: name the codec of {name} "
                f"that the checkpoint was trained with"
            )
    if list(known) != list(sizes)[: len(known)]:
        raise UserError(
            f"the checkpoint's ids are of {', '.join(known)} in this order, the recipe's of {', '.join(sizes)}: train "
            f"the further ones last"
        )
    if config.vocab_size == sum(sizes.values()):
        return weights
    joint = copy.deepcopy(config)
    joint.vocab_size, joint.modality_sizes = sum(sizes.values()), [list(item) for item in sizes.items()]
    return _Joined(joint, weights, sum(known.values()), RandomWeights(joint, seed))
