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
    layer's backward, with what is computed again. between: left of a layer when its MLP's gradients are ready, after
    the one and before the other. exchange: keys and gradients of other ranks in the attention. final: from the last
    layer to the loss. loss: a chunk's logits and the head's gradient. batch: ids, positions, labels, weights and RoPE's
    tables.
    """

    kept_layer: int
    kept_host: int
    mlp: int
    attention: int
    between: int
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
    row, wide = hidden * itemsize, config.intermediate_size * itemsize
    # Of a norm: its result; torch's own also keeps the normalised row and, of half precision, the row in fp32.
    exact = 0 if fused or itemsize == FP32 else FP32 * hidden
    norm = row + (0 if fused else row + exact)
    entry = 0 if exact else row  # what goes into a norm, unless its copy is kept
    norm_backward = row if fused else 5 * FP32 * hidden
    lse = heads * FP32
    result = q * itemsize + lse
    attention = (q + 2 * kv) * itemsize + result + (q * itemsize if plan.ulysses > 1 else 0)
    mlp = 0 if memory.mlp_tile else (3 if fused else 4) * wide
    first, second = norm + attention, entry + norm + mlp  # the layer's halves, but for what goes into the first
    # Kept of a layer; computed again before the MLP's backward; left of both for its norm's and for the attention's.
    kept, again, left_of_norm, left = {
        "keep": (entry + first + second, 0, exact - norm - mlp, -second),
        "mlp": (3 * row + attention, norm + mlp, exact, -row),
        "all-but-attention": (row + result, first - result + second, first - result + entry + exact, first - result),
        "full": (row, first + second, first + entry + exact, first),
    }[memory.activations]
    in_mlp, mlp_weights = (again + row) * tokens, 3 * hidden * config.intermediate_size
    if memory.mlp_tile:
        in_mlp += row * tokens + min(memory.mlp_tile, tokens) * 6 * wide + mlp_weights * _exact(itemsize)
    else:
        in_mlp += 2 * wide * tokens
    in_mlp = max(in_mlp, (left_of_norm + row + norm_backward) * tokens)
    at_once = max(_queries_at_once(plan.rank(rank), on_cuda) for rank in some_ranks(plan))
    of_call = _card_backward(heads, kv_heads, head, itemsize) if on_cuda else (q + 2 * kv) * FP32
    if not on_cuda and itemsize < FP32:  # the CPU's kernel takes copies in fp32
        of_call += (3 * q + 2 * kv) * FP32
    sums = 2 * kv * itemsize + (q + 2 * kv) * FP32  # keys and values side by side, and the gradients' sums
    in_attention = (left + 2 * row + sums) * tokens + of_call * at_once // plan.ulysses
    pinned = [row, q * itemsize, lse] if memory.activations == "all-but-attention" else [row]
    offloaded = memory.offload_activations and on_cuda  # of a CPU the device is the host
    back = kept * tokens if offloaded else 0  # at work
    widest = max(map(len, modality_ranges(config).values()))
    head_gradient = config.vocab_size * hidden * _exact(itemsize)
    chunk = min(settings.loss_chunk, tokens) * (widest * (FP32 + itemsize) + 2 * row)
    final = (2 * row + norm + 20) * tokens  # with the loss of each, its lse, weight and row
    loss = max(row * tokens + head_gradient + chunk, (entry + exact + norm_backward) * tokens - final)
    return ActivationBytes(
        kept_layer=0 if offloaded else kept * tokens,
        kept_host=sum(1 << (block * tokens - 1).bit_length() for block in pinned) if offloaded else 0,
        mlp=in_mlp + back,
        attention=in_attention + back,
        between=max(0, (left + 2 * row) * tokens + back) + mlp_weights * itemsize,
        exchange=max(_exchange(plan.rank(rank), kv // plan.ulysses, itemsize) for rank in some_ranks(plan)),
        final=final,
        loss=loss,
        batch=tokens * (3 * 8 + 4 + 2 * head * FP32),
    )


def _queries_at_once(plan: RankPlan, on_cuda: bool) -> int:
    """Queries of the rank's own runs that one kernel call takes: a card's those of one kind, a CPU's a run."""
    if on_cuda:
        return max(sum(end - start for start, end in call.queries) for call in plan.local.calls)
    return max(run.q_end - run.q_start for run in plan.local)


def _card_backward(heads: int, kv_heads: int, head: int, itemsize: int) -> int:
    """Bytes a token of FlashAttention-2's backward (torch's flash_api.cpp, mha_varlen_bwd).

    The block's gradients; dq in fp32, of a head size rounded up to 32; a row's logsumexp and sum for each head; and,
    where several query heads share a key, its gradients once for each of them.
    """
    rounded = -(-head // 32) * 32
    gradients = (heads + 2 * kv_heads) * head * itemsize
    shared = 2 * heads * head * itemsize if kv_heads < heads else 0
    return gradients + shared + heads * (rounded + 2) * FP32


def some_ranks(plan: SequencePlan) -> range:
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
