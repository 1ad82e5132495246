"""From a size's name, or explicit sizes, to the configuration of a plain Hugging Face Llama.

In: a preset of LWM (arXiv 2402.08268) or a mapping of sizes, the joint vocabulary, the context and RoPE's theta. Out:
`transformers.LlamaConfig`. The ranges of the vocabulary are in the configuration as `modality_sizes`, an extra key that
other loaders ignore, so that a checkpoint alone shows which ids are text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from model.llama.sizes import PRESETS, llama_sizes
from storage.errors import UserError

__all__ = ["PRESETS", "attention_sizes", "llama_config", "modality_ranges"]


def llama_config(
    size: str | Mapping[str, Any],
    vocabulary: int | Mapping[str, int],
    context: int,
    rope_theta: float,
    bos_id: int = 1,
    eos_id: int = 2,
) -> LlamaConfig:
    """Configuration of a Llama as LWM trains it: RMSNorm eps 1e-6, SwiGLU, no biases, untied embeddings, default RoPE.

    size: "7B", "1B", "200M", "debug", or a mapping with the four sizes by their Hugging Face names and, optionally,
    num_key_value_heads (grouped-query attention), head_dim, initializer_range, rms_norm_eps. vocabulary: ids of each
    modality by name, in the order of their ranges (`JointVocabulary.sizes`); a number is of text ids alone. context:
    tokens. Raises UserError on an unknown name or key, a missing size, or sizes that do not fit each other.
    """
    sizes = llama_sizes(size)
    ids = {"text": vocabulary} if isinstance(vocabulary, int) else dict(vocabulary)
    if wrong := [name for name, n_ids in ids.items() if n_ids < 1]:
        raise UserError(f"model: the vocabulary has {ids[wrong[0]]} {wrong[0]} ids; it needs 1 at least")
    defaults = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
    return LlamaConfig(
        **{**defaults, **sizes, "modality_sizes": [list(item) for item in ids.items()]},
        vocab_size=sum(ids.values()),
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        architectures=["LlamaForCausalLM"],
    )


def modality_ranges(config: LlamaConfig) -> dict[str, range]:
    """The ids of each modality by name, in their order; without `modality_sizes` all ids are text's.

    Checkpoints of an older version, of text and vision, have only the number of text ids, as `text_vocab_size`.
    """
    sizes = getattr(config, "modality_sizes", None)
    if sizes is None:
        text = getattr(config, "text_vocab_size", None) or config.vocab_size
        sizes = [("text", text), ("vision", config.vocab_size - text)]
    stops = itertools.accumulate(size for _, size in sizes)
    return {name: range(stop - size, stop) for (name, size), stop in zip(sizes, stops) if size}


def attention_sizes(config: LlamaConfig) -> tuple[int, int, int]:
    """Query heads, kv heads and head size."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim or config.hidden_size // heads
