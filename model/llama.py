"""Transformers' own `LlamaForCausalLM`, made ready for long packed sequences without changing what it is.

Three things differ from a stock instance, none of them visible in a checkpoint: the rotary module computes exact
angles, the head can give the loss in chunks, and "ring" attention is registered and chosen. What `save_llama` writes is
a plain Hugging Face checkpoint, and `load_llama` reads any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoConfig, LlamaForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

from model.attention.register import NAME as RING
from model.attention.register import ring_attention_forward
from model.config import text_vocab_size
from model.loss import LossHead
from model.rope import FP32_TABLES, ExactRotaryEmbedding, rounding_rotated
from tokenization.errors import UserError

MAX_SHARD_BYTES = 4 << 30

# The ring computes in v's dtype; the rotation before it stays in fp32.
AttentionInterface.register(RING, rounding_rotated(ring_attention_forward))
FP32_TABLES.add(RING)


def build_llama(
    config: LlamaConfig, seed: int, attention: str = RING, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A fresh model: the same seed gives the same weights, and the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)
    return _made_ready(model)


def load_llama(
    path: str | Path,
    attention: str = RING,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    rope_theta: float | None = None,
) -> LlamaForCausalLM:
    """The Llama at `path`, a folder with config.json and safetensors; None keeps what the checkpoint says.

    context, rope_theta: a training stage's own, which raise those of the stage before. Raises UserError where there is
    no such folder or it holds another architecture.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: no config.json there; name the folder of a Hugging Face Llama checkpoint")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llama":
        raise UserError(f"{path}/config.json: model_type {config.model_type!r} is not 'llama'; name a Llama checkpoint")
    if context is not None:
        config.max_position_embeddings = context
    if rope_theta is not None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    model = LlamaForCausalLM.from_pretrained(
        path, config=config, attn_implementation=attention, dtype=dtype or "auto", local_files_only=True
    )
    return _made_ready(model)


def save_llama(model: LlamaForCausalLM, path: str | Path) -> None:
    """Write a plain Hugging Face checkpoint (config.json, safetensors), loadable by any Llama server."""
    model.save_pretrained(path, max_shard_size=MAX_SHARD_BYTES)


def extend_vocabulary(model: LlamaForCausalLM, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Add rows for vision ids to a text model's table and head, drawn like fresh weights; text rows stay as they are.

    vocab_size: the joint vocabulary's. The model is changed in place and returned. Raises ValueError unless it grows.
    """
    text = text_vocab_size(model.config)
    if vocab_size < model.config.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} ids already, more than {vocab_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.config.text_vocab_size = text
    return _made_ready(model)


@contextmanager
def inference(model: LlamaForCausalLM, attention: str = "sdpa") -> Iterator[None]:
    """Within it the model attends with a stock function that knows the KV cache, without dropout or gradients."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation(attention)
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _made_ready(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.model.rotary_emb = ExactRotaryEmbedding(model.config)
    model.lm_head = LossHead.adopt(model.lm_head)
    return model
