"""The peak of prefill and decoding on one rank, predicted by part, without allocating anything.

In: a Llama's sizes, the context, the ranks that share it, how its cache and weights are kept. Out: `InferenceMemory`,
counted tensor by tensor from what `model.inference` has alive while a full chunk meets a cache that is nearly full.
That is the peak: a token that is decoded takes as much less as a chunk has tokens. Not counted are the process itself
(Python, torch, the CUDA runtime) and what an allocator cannot use again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import LlamaConfig

from model.attention.plan.hardware import CPU_CORES, AttentionShape, Hardware
from model.inference.kv_cache import MAX_CONVERTED
from model.inference.prefill import chunk_tokens, plan_chunks
from model.inference.scaled_numbers import SCALE_BYTES, CacheFormat
from model.llama.config import attention_sizes
from model.memory_estimate.activations import some_ranks
from model.memory_estimate.plan import parameter_counts
from model.memory_estimate.zero import FP32

DOUBLED = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of ranks that are tried."""


@dataclass(frozen=True)
class InferenceSettings:
    """How a context is answered.

    context: tokens of the prompts of all rows together. ranks: that share it. rows, new_tokens: sequences that are
    decoded, and tokens of each. itemsize: bytes of a weight and of an activation, 2 or 4. cache: None is the model's
    dtype. split: whether the ranks share the weights too. chunk: tokens a rank of a chunk, None for the decoder's own
    choice.
    """

    context: int
    ranks: int = 1
    rows: int = 1
    new_tokens: int = 0
    itemsize: int = 2
    cache: CacheFormat | None = None
    split: bool = False
    chunk: int | None = None


@dataclass(frozen=True)
class InferenceMemory:
    """parts: bytes on the fullest rank's device by part at the peak, which is within the prefill."""

    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def plan_inference(config: LlamaConfig, settings: InferenceSettings, on_cuda: bool) -> InferenceMemory:
    """The peak of one rank."""
    activations = {"a chunk's activations": _activations(config, settings, on_cuda)}
    return InferenceMemory({**_kept(config, settings), **activations})


def least_ranks(
    config: LlamaConfig, settings: InferenceSettings, device_bytes: int, on_cuda: bool
) -> tuple[int, InferenceMemory] | None:
    """The fewest ranks of `DOUBLED` on whose devices the context fits, and what it takes there; None where none do."""
    for ranks in DOUBLED:
        shared = replace(settings, ranks=ranks)
        if sum(_kept(config, shared).values()) < device_bytes:
            memory = plan_inference(config, shared, on_cuda)
            if memory.peak <= device_bytes:
                return ranks, memory
    return None


def _kept(config: LlamaConfig, settings: InferenceSettings) -> dict[str, int]:
    """All but the activations."""
    ranks, itemsize = settings.ranks, settings.itemsize
    tokens = -(-settings.context // ranks) + settings.rows * -(-settings.new_tokens // ranks)
    parts = {
        "weights": _weights(config, settings),
        "keys and values": tokens * token_bytes(config, itemsize, settings.cache),
        "logits": settings.rows * config.vocab_size * (FP32 + itemsize),
    }
    if settings.split and ranks > 1:
        parts["two gathered layers"] = 2 * itemsize * parameter_counts(config)[1]
    return parts


def token_bytes(config: LlamaConfig, itemsize: int, cache: CacheFormat | None = None) -> int:
    """Bytes of a cached token, over all layers and heads."""
    _, kv_heads, head = attention_sizes(config)
    vector = head + SCALE_BYTES if cache else head * itemsize
    return 2 * config.num_hidden_layers * kv_heads * vector


def _weights(config: LlamaConfig, settings: InferenceSettings) -> int:
    n_parameters, _, _ = parameter_counts(config)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    ranks = settings.ranks if settings.split else 1
    return settings.itemsize * (norms + -(-(n_parameters - norms) // ranks))


def _activations(config: LlamaConfig, settings: InferenceSettings, on_cuda: bool) -> int:
    """What `final_hidden` has alive at most, of a chunk whose tokens all have older keys."""
    ranks, itemsize = settings.ranks, settings.itemsize
    chunk = min(settings.chunk or chunk_tokens(ranks), -(-settings.context // ranks))
    heads, kv_heads, head = attention_sizes(config)
    hidden, q, kv = config.hidden_size, heads * head, kv_heads * head
    result = (q + heads) * FP32  # the attention's, with its log-sum-exp
    asking = chunk * ranks if settings.context > chunk * ranks else 0
    # The layer's entry, RoPE's tables, ids and positions; the projections; the layer's result before.
    always = chunk * (itemsize * (hidden + (q + 2 * kv) + q) + 2 * head * FP32 + 16)
    turned = chunk * itemsize * (q + kv)
    queries = asking * q * itemsize if ranks > 1 else 0
    is_converted = not on_cuda and itemsize < FP32
    exact = (q + 2 * kv) * FP32 if is_converted else 0
    block = q * (itemsize if on_cuda else FP32) + heads * FP32
    exchange = _exchanged(chunk, ranks, AttentionShape(heads, kv_heads, head, itemsize), on_cuda) * 2 * kv * itemsize
    kernel = 0 if on_cuda else _cpu_buffer(chunk, head)
    # On a CPU the result of a single run is taken as it is, without a copy.
    copied = 0 if ranks == 1 and not on_cuda else result
    among = chunk * (2 * kv * itemsize + copied + block + exact) + exchange + kernel
    grouped = heads > kv_heads
    kept = -(-settings.context // ranks) - chunk  # older tokens, when the last chunk meets them
    tile = min(MAX_CONVERTED, kept) * 2 * kv * _converted(settings, is_converted)
    kernel = 0 if on_cuda else _cpu_buffer(asking * heads // kv_heads, head)
    if not on_cuda and (kept <= MAX_CONVERTED or not (is_converted or settings.cache)):
        block -= result  # of a single run, too
    grouping = q * itemsize if grouped else 0
    older = kernel + asking * (result + block + (q * FP32 if is_converted else 0) + grouping) + tile
    unfolded = asking * (2 * result + q * itemsize) if grouped else 0
    merged = asking * result + (asking - asking // ranks) * result
    wide = chunk * itemsize * (hidden + 2 * config.intermediate_size)
    moments = (
        turned + queries + among,
        turned + queries + chunk * result + max(older, unfolded),
        turned + chunk * result + merged,
        wide,
    )
    return always + max(moments)


def _converted(settings: InferenceSettings, is_converted: bool) -> int:
    """Bytes at work of each number of a tile that is converted."""
    if settings.cache:
        return FP32 + (settings.itemsize if settings.itemsize < FP32 else 0)
    return FP32 if is_converted else 0


@lru_cache
def _exchanged(chunk: int, ranks: int, shape: AttentionShape, on_cuda: bool) -> int:
    """The most keys of other ranks that one has here or under way, with own ones copied together for others."""
    hardware = Hardware() if on_cuda else CPU_CORES
    plan = plan_chunks([chunk * ranks], chunk, ranks, shape, hardware)[0].plan
    most = 0
    for stages in (plan.rank(rank).stages for rank in some_ranks(plan)):
        for i in range(len(stages)):
            received = sum(stage.n_keys for stage in stages[i : i + 3])
            copies = sum(m.n_keys for stage in stages[i : i + 3] for m in stage.sends if len(m.ranges) > 1)
            most = max(most, received + copies)
    return most


def _cpu_buffer(queries: int, head: int) -> int:
    """Bytes at work on one thread in torch's flash attention (its FlashAttentionKernel.cpp): a tile of scores, their
    largest and sums, and results.
    """
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return rows * (512 + 2 + head) * FP32
