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

    A Mistral without a sliding window is a Llama by another name. Tied embeddings are parted, for text and vision rows
    of table and head are trained apart. context, rope_theta: a training stage's own, which raise those of the stage
    before and take the place of any scaling of positions. Raises UserError where there is no such folder or it holds
    another architecture.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: no config.json there; name the folder of a Hugging Face Llama checkpoint")
    config = _llama_config_at(path)
    if context is not None:
        config.max_position_embeddings = context
    if rope_theta is not None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": float(rope_theta)}
    model = LlamaForCausalLM.from_pretrained(
        path, config=config, attn_implementation=attention, dtype=dtype or "auto", local_files_only=True
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return _made_ready(model)


def _llama_config_at(path: str | Path) -> LlamaConfig:
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "mistral":
        if config.sliding_window is not None:
            raise UserError(
                f"{path}/config.json: sliding_window {config.sliding_window} is not what a Llama does; name a "
                f"checkpoint that attends to all of its context"
            )
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "sliding_window")}
        config = LlamaConfig(**values)
    if config.model_type != "llama":
        raise UserError(f"{path}/config.json: model_type {config.model_type!r} is not 'llama'; name a Llama checkpoint")
    return config


def save_llama(model: LlamaForCausalLM, path: str | Path) -> None:
    """Write a plain Hugging Face checkpoint (config.json, safetensors), loadable by any Llama server."""
    model.save_pretrained(path, max_shard_size=MAX_SHARD_BYTES)


def join_vision(model: LlamaForCausalLM, text_size: int, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Give a text model's table and head the rows of vision ids, drawn like fresh weights, behind its text rows.

    text_size, vocab_size: of the joint vocabulary. Rows of a text model beyond `text_size`, by which tables are padded
    to a round number, are let go. A model that has its vision rows is left alone. The model is changed in place and
    returned. Raises UserError where it knows other text or vision ids.
    """
    config = model.config
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
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(text_size, mean_resizing=False)
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    config.text_vocab_size = text_size
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
