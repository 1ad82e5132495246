"""Bytes of a step's activations on one rank: kept for the backward, at work in one layer, loss, exchange.

In: a Llama's sizes, the plan of a packed sequence, and what is kept of a layer. Out: `ActivationBytes`, counted tensor
by tensor from what autograd saves in transformers' Llama, our attention, MLP and loss, and the backward's temporaries.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from model.attention.plan.runs import RankPlan
from model.attention.plan.sequence_plan import SequencePlan
from model.llama.config import attention_sizes, modality_ranges
from model.memory_estimate.zero import FP32
from model.training.settings import EngineSettings


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes on the fullest rank.

    kept_layer: of each layer between its forward and its backward, on the device; kept_host: on the host instead, in
    pinned blocks that torch's allocator rounds up to a power of two. mlp, attention: at work at once in that part of a
    layer's backward, with what is computed again. exchange: keys and gradients of other ranks in the attention. final:
    from the last layer to the loss. loss: a chunk's logits and the head's gradient. batch: ids, positions, labels,
    weights and RoPE's tables.
    """

    kept_layer: int
    kept_host: int
    mlp: int
    attention: int
    exchange: int
    final: int
    loss: int
    batch: int


def activation_bytes(
    config: LlamaConfig, itemsize: int, plan: SequencePlan, settings: EngineSettings, on_cuda: bool
) -> ActivationBytes:
    """See `ActivationBytes`. itemsize: of activations, 4 or 2. plan: of what one forward pass takes."""
    memory, fused = settings.memory, settings.kernels != "torch"
    tokens = plan.tokens_per_rank
    heads, kv_heads, head = attention_sizes(config)
    hidden, q, kv = config.hidden_size, heads * head, kv_heads * head
    row = hidden * itemsize
    norm = row  # the result
    if not fused:
        norm += row + (FP32 * hidden if itemsize < FP32 else 0)  # the normalised rows, fp32 rows before
    lse = heads * FP32
    result = q * itemsize + lse
    attention = (q + 2 * kv) * itemsize + result + (q * itemsize if plan.ulysses > 1 else 0)
    wide = config.intermediate_size * itemsize
    mlp = 0 if memory.mlp_tile else (3 if fused else 4) * wide
    first, second = row + norm + attention, row + norm + mlp  # the layer's halves
    # Kept of a layer; computed again before the MLP's backward; left of both for the attention's.
    kept, again, left = {
        "keep": (first + second, 0, -second),
        "mlp": (row + row + attention + row, norm + mlp, norm - 2 * row),
        "all-but-attention": (row + result, first + second - row - result, first - row - result),
        "full": (row, first + second - row, first - row),
    }[memory.activations]
    in_mlp = (again + 2 * row) * tokens
    if memory.mlp_tile:
        weights = 3 * hidden * config.intermediate_size
        in_mlp += min(memory.mlp_tile, tokens) * 6 * wide + weights * _exact(itemsize)
    else:
        in_mlp += 2 * wide * tokens
    longest = max(run.q_end - run.q_start for rank in _some(plan) for run in plan.rank(rank).local)
    of_runs = (q + 2 * kv) * (itemsize if on_cuda else FP32)
    if not on_cuda and itemsize < FP32:  # the CPU's kernel takes copies in fp32
        of_runs += (3 * q + 2 * kv) * FP32
    in_attention = (left + 2 * row + (q + 2 * kv) * (itemsize + FP32)) * tokens + of_runs * longest // plan.ulysses
    pinned = [row, q * itemsize, lse] if memory.activations == "all-but-attention" else [row]
    offloaded = memory.offload_activations and on_cuda  # of a CPU the device is the host
    if offloaded:  # at work, it is back
        in_mlp, in_attention = in_mlp + kept * tokens, in_attention + kept * tokens
    widest = max(map(len, modality_ranges(config).values()))
    head_gradient = config.vocab_size * hidden * _exact(itemsize)
    chunk = min(settings.loss_chunk, tokens) * (widest * (FP32 + itemsize) + 2 * row)
    return ActivationBytes(
        kept_layer=0 if offloaded else kept * tokens,
        kept_host=sum(1 << (block * tokens - 1).bit_length() for block in pinned) if offloaded else 0,
        mlp=in_mlp,
        attention=in_attention,
        exchange=max(_exchange(plan.rank(rank), kv // plan.ulysses, itemsize) for rank in _some(plan)),
        final=(2 * row + norm + 20) * tokens,  # and the loss of each, its lse, weight and row
        loss=row * tokens + head_gradient + chunk,
        batch=tokens * (3 * 8 + 4 + 2 * head * FP32),
    )


def _some(plan: SequencePlan) -> range:
    """Enough ranks to find the fullest: about 16, evenly spaced."""
    return range(0, plan.sp, max(1, plan.sp // 16))


def _exact(itemsize: int) -> int:
    """Bytes of a gradient that is summed in fp32 and then rounded to the weights' dtype."""
    return FP32 if itemsize == FP32 else FP32 + itemsize


def _exchange(plan: RankPlan, kv: int, itemsize: int) -> int:
    """The most bytes of other ranks' keys, of their gradients, and of received own gradients during a backward."""
    stages = plan.stages
    most = 0
    for i in range(len(stages)):
        under_way = sum(s.n_keys for s in stages[i : i + 3])
        sent = sum(message.n_keys for s in stages[max(0, i - 1) : i + 1] for message in s.sends)
        gradients = sum(s.n_keys for s in stages[max(0, i - 1) : i + 1])
        copies = sum(m.n_keys for s in stages[i : i + 3] for m in s.sends if len(m.ranges) > 1)
        most = max(most, 2 * kv * (itemsize * (under_way + copies) + FP32 * (gradients + sent)))
    return most
