"""Bytes of a rank that scores a sequence without gradients (`model.inference.scoring`), beside the model's weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from model.llama.config import attention_sizes, modality_ranges
from model.memory_estimate.zero import FP32

_PER_TOKEN = 64
"""Ids, positions and labels in int64, their weights and losses in fp32, and what is made of them to take the sums."""


def scoring_bytes_per_token(config: LlamaConfig, itemsize: int, ranks: int, on_cuda: bool) -> int:
    """Bytes for each token that a rank holds, S / P of them, at most. itemsize: of the weights' dtype."""
    heads, kv_heads, head = attention_sizes(config)
    attended = itemsize if on_cuda else FP32
    if not on_cuda and itemsize < FP32:  # the CPU's kernel takes copies in fp32
        attended += FP32 * (heads + 2 * kv_heads) // heads
    received = 3 * 2 * kv_heads * head * itemsize if ranks > 1 else 0
    return (
        config.hidden_size * itemsize
        + (heads + 2 * kv_heads) * head * itemsize
        + heads * head * (FP32 + attended)
        + received
        + 2 * head * FP32
        + 2 * heads * FP32
        + _PER_TOKEN
    )


def scoring_bytes(
    config: LlamaConfig, itemsize: int, tokens: int, ranks: int, on_cuda: bool, tile: int, chunk: int
) -> int:
    """Bytes of a rank that holds `tokens` of a sequence, at most. tile, chunk: of `score_batch`."""
    widest = max(map(len, modality_ranges(config).values()))
    layer = 3 * config.intermediate_size * itemsize + 6 * config.hidden_size * FP32
    logits = chunk * (widest * (2 * FP32 + itemsize) + 2 * config.hidden_size * itemsize)
    of_tile = max(tile * layer, tile * 2 * config.hidden_size * itemsize + logits)
    # Of the attention: the CPU's kernel holds the scores of 256 queries and 512 keys, and two results, for each thread.
    of_kernel = 0 if on_cuda else torch.get_num_threads() * 256 * (512 + 2 * attention_sizes(config)[2]) * FP32
    return tokens * scoring_bytes_per_token(config, itemsize, ranks, on_cuda) + max(of_tile, of_kernel)
