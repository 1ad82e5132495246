"""Where a model's first weights come from, one at a time, so that nobody has to hold them all.

In: a configuration and a seed, or weights that lack the rows of vision ids. Out: `Weights`, which gives each tensor by
its Hugging Face name when it is asked for. Those of a checkpoint's files are in `model.llama.hf_weights`.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.llama.config import text_vocab_size
from storage.errors import UserError

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Weights(Protocol):
    """The weights of a Llama of `config`, which has tables of their own for embeddings and head."""

    @property
    def config(self) -> LlamaConfig:
        """The model's."""

    def check(self) -> None:
        """Raise UserError where any weight cannot be had, before the first is read."""

    def read(self, name: str) -> Tensor:
        """The weight of this name, in any floating dtype, in host memory that is the caller's from here on."""


def weight_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Shape of every weight by name, in the model's order."""
    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class RandomWeights:
    """Fresh ones in fp32, each a function of the seed, its name and its shape alone.

    Matrices are normal by the configuration's `initializer_range`, norms are 1, as transformers begins.
    """

    def __init__(self, config: LlamaConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._shapes = weight_shapes(config)

    def check(self) -> None:
        """They can always be had."""

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(std=self.config.initializer_range, generator=generator)


class BlankWeights:
    """Zeros, in fp32: for an engine into which a checkpoint is to be loaded."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._shapes = weight_shapes(config)

    def check(self) -> None:
        """They can always be had."""

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        return torch.zeros(self._shapes[name])


@dataclass(frozen=True)
class _WithVision:
    text: Weights
    fresh: RandomWeights

    @property
    def config(self) -> LlamaConfig:
        return self.fresh.config

    def check(self) -> None:
        self.text.check()

    def read(self, name: str) -> Tensor:
        if name not in (EMBEDDINGS, HEAD):
            return self.text.read(name)
        table, n_text = self.fresh.read(name), text_vocab_size(self.config)
        table[:n_text] = self.text.read(name)[:n_text]
        return table


def join_vision(weights: Weights, text_size: int, vocab_size: int, seed: int) -> Weights:
    """Give a text model's table and head the rows of vision ids, drawn like fresh weights, behind its text rows.

    text_size, vocab_size: of the joint vocabulary. Rows of a text model beyond `text_size`, by which tables are padded
    to a round number, are let go. Weights that have their vision rows are returned as they are. Raises UserError where
    the model knows other text or vision ids.
    """
    config = weights.config
    known = text_vocab_size(config)
    of_text_alone = known == config.vocab_size
    if known < text_size or (known > text_size and not of_text_alone):
        raise UserError(
            f"the checkpoint has {known} text ids, the text tokenizer {text_size}: set text_tokenizer.path to the "
            f"checkpoint's own"
        )
    if not of_text_alone:
        if config.vocab_size != vocab_size:
            raise UserError(
                f"the checkpoint has {config.vocab_size - known} vision ids, the recipe {vocab_size - text_size}: "
                f"name the VQGAN that the checkpoint was trained with"
            )
        return weights
    joint = copy.deepcopy(config)
    joint.vocab_size, joint.text_vocab_size = vocab_size, text_size
    return _WithVision(weights, RandomWeights(joint, seed))
