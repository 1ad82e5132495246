"""Plain transformers beside our decoding: the same weights, its own attention and KV cache, a prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from model.llama.config import llama_config
from model.llama.llama import build_llama

VOCABULARY = 96
GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
"""Sizes of a small model of grouped-query attention, whose greedy tokens vary."""


def small_llama(**sizes: object) -> LlamaForCausalLM:
    """A fresh model of ours, the same in every process."""
    return build_llama(llama_config({**GROUPED, **sizes}, VOCABULARY, 512, 1e4), seed=1)


def stock(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Transformers' own model of the same weights."""
    config = copy.deepcopy(model.config)
    plain = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@torch.inference_mode()
def decoded_alone(
    plain: LlamaForCausalLM, prompt: np.ndarray, n_tokens: int, given: Sequence[int] = ()
) -> tuple[Tensor, list[int]]:
    """Logits [n, V] and greedy ids of n tokens after a prompt; `given` ids are taken in the place of the first ones."""
    cache = DynamicCache(config=plain.config)
    ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None]
    logits, chosen = [], []
    for step in range(n_tokens):
        logits.append(plain(ids, past_key_values=cache, use_cache=True).logits[0, -1])
        chosen.append(given[step] if step < len(given) else int(logits[-1].argmax()))
        ids = torch.tensor([chosen[-1:]])
    return torch.stack(logits), chosen
