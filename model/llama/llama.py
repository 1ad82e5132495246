"""Transformers' own `LlamaForCausalLM`, made ready for long packed sequences without changing what it is.

Three things differ from a stock instance, none of them visible in a checkpoint: queries and keys are turned by exact
angles, the head can compute the loss in chunks, and "ring" attention is chosen. `save_pretrained` writes a plain
Hugging Face checkpoint, and `load_llama` reads any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention.hf_interface import NAME as RING
from model.llama.hf_weights import StoredWeights, stored_config
from model.llama.initial_weights import EMBEDDINGS, RandomWeights, Weights
from model.llama.loss import LossHead
from model.llama.rope import ExactLlamaAttention, ExactRotaryEmbedding


def build_llama(
    config: LlamaConfig, seed: int, attention: str = RING, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A fresh model: the same seed gives the same weights, and the caller's random state is left alone."""
    return whole_llama(RandomWeights(config, seed), attention, dtype)


def load_llama(path: str | Path, attention: str = RING, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """The Llama at `path`, a folder with config.json and safetensors; dtype: None keeps that of its embeddings.

    Raises UserError where there is no such folder, it holds another architecture, or not all of a model.
    """
    weights = StoredWeights(stored_config(path), lambda: Path(path))
    weights.check()
    return whole_llama(weights, attention, dtype or weights.read(EMBEDDINGS).dtype)


def whole_llama(weights: Weights, attention: str = RING, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model of these weights, on the host."""
    model = empty_llama(weights.config, attention, dtype)
    fill(model, lambda name, empty: weights.read(name).to(empty.dtype))
    return model


def empty_llama(config: LlamaConfig, attention: str = RING, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model whose parameters have shapes and dtype, but no memory until `fill`."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=attention, dtype=dtype)
    model.model.rotary_emb = ExactRotaryEmbedding(model.config)
    for layer in model.model.layers:
        layer.self_attn.__class__ = ExactLlamaAttention
    model.lm_head = LossHead.adopt(model.lm_head)
    return model


def fill(
    model: LlamaForCausalLM,
    weight: Callable[[str, nn.Parameter], Tensor],
    filled: Callable[[nn.Module], object] = lambda module: None,
) -> None:
    """Put weights in the place of an empty model's parameters, one module after another.

    weight: returns a parameter's tensor, which the model then owns, from its name and the empty parameter. filled:
    called with each module once its own parameters, not those of modules inside it, are there.
    """
    for place, module in model.named_modules():
        parameters = list(module.named_parameters(recurse=False))
        for name, empty in parameters:
            module.register_parameter(name, nn.Parameter(weight(f"{place}.{name}", empty)))
        if parameters:
            filled(module)


@contextmanager
def inference(model: LlamaForCausalLM, attention: str = "sdpa") -> Iterator[None]:
    """Within it the model attends by a stock function that supports the KV cache, without dropout or gradients."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(attention)
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)
