"""Decoding and prefill of a 7B on the card: tokens a second and seconds at 1K to 256K tokens of context, batch 1.

A stack of LWM-7B's layers, embeddings and head, in two depths; what 32 layers take is extrapolated from both, a
straight line in the layers, and named so. A step of decoding appends a token, computes the text's logits and takes the
largest. Its floor is the bytes that it has to read, weights and cache, by the copy bandwidth of the same card. The
cache of a step is filled with drawn keys and values, as no kernel's time depends on them. Prefill is `Decoder`'s own,
in chunks; its MFU is by the operations of `model.llama.flops` over the data sheet's peak.

That the timed thing is the right one is checked: tokens decoded against a full forward without a cache, every timed
cache by a step that merges its parts, operations against those that torch counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks.gpu.explain import check_share, copy_bandwidth, explained, matrix_peak
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.timing import seconds_of
from model.inference.kv_decoder import Decoder
from model.llama.config import llama_config
from model.llama.flops import peak_flops, step_flops
from model.llama.llama import empty_llama, fill, inference
from model.llama.sizes import PRESETS

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"text": 32_000, "vision": 8_448}
LAYERS = 32
"""Of the model to which depths are extrapolated."""
CONTEXTS = (1024, 16_384, 65_536, 262_144)
LONG = 65_536
"""Tokens from which on a prefill is run once, in one layer and in two."""
DECODING = 0.5
"""Goal: share of the floor's speed that a step reaches, of 32 layers."""
PREFILL = 0.4
"""Goal: MFU of prefill, of 32 layers."""
LIMIT = 0.03
"""Relative error of hidden states in bf16 by another way or without a cache."""
STEPS = 64
"""Tokens for which a filled cache has room."""


@dataclass(frozen=True)
class Stack:
    """A model on the device whose first layers can be run alone. depths: by how many, few and more."""

    bench: Bench
    model: LlamaForCausalLM
    depths: tuple[int, int]

    @contextmanager
    def of(self, layers: int) -> Iterator[LlamaForCausalLM]:
        """Within it the model has its first `layers` layers only."""
        config, llama = self.model.config, self.model.model
        before = config.num_hidden_layers, llama.layers
        config.num_hidden_layers, llama.layers = layers, llama.layers[:layers]
        try:
            yield self.model
        finally:
            config.num_hidden_layers, llama.layers = before


def run(bench: Bench) -> None:
    """Checks, then decoding at every context, then prefill from short to long."""
    depths = bench.size((2, 4), (1, 2))
    stack = Stack(bench, _model(bench, {**bench.size(PRESETS["7B"], TINY), "num_hidden_layers": depths[1]}), depths)
    _check_operations(bench)
    _check_decoding(stack, bench.size(1024, 40))
    contexts = bench.size(CONTEXTS, (32, 64))
    for context in contexts:
        _decode(stack, context)
    for context in contexts:
        _prefills(stack if context < LONG else replace(stack, depths=(1, 2)), context)


def _model(bench: Bench, sizes: dict[str, Any]) -> LlamaForCausalLM:
    """Drawn where it is, in bf16: a host would take a minute."""
    config = llama_config(sizes, IDS, context=2**18, rope_theta=5e7)
    model = empty_llama(config, dtype=torch.bfloat16)
    generator = torch.Generator(bench.device).manual_seed(0)

    def weight(_: str, empty: nn.Parameter) -> Tensor:
        value = torch.ones(empty.shape, dtype=empty.dtype, device=bench.device)
        return value.normal_(std=config.initializer_range, generator=generator) if empty.dim() > 1 else value

    fill(model, weight)
    return model


# --- Checks ---


def _check_operations(bench: Bench) -> None:
    """Those of a forward against torch's count of its matrix products; plain attention computes every pair."""
    tokens = 48
    model = _model(bench, TINY)
    ids = torch.arange(tokens, device=bench.device).unsqueeze(0)
    with inference(model, "eager"), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, position_ids=ids, use_cache=False)
    reckoned = step_flops(model.config, tokens, tokens**2, {}, backward=False)
    ratio = counter.get_total_flops() / reckoned
    bench.check("operations that torch counts, over those reckoned", ratio, at_most=1.01, at_least=0.99)


def _check_decoding(stack: Stack, context: int) -> None:
    """Tokens after a prefill against one forward without a cache."""
    new, model = 4, stack.model
    sequence = np.random.default_rng(0).integers(0, IDS["text"], context + new)
    ids = torch.from_numpy(sequence).to(stack.bench.device)
    with inference(model):
        positions = torch.arange(len(ids), device=ids.device).unsqueeze(0)
        whole = model.model(input_ids=ids.unsqueeze(0), position_ids=positions, use_cache=False).last_hidden_state[0]
        decoder = Decoder(model, [sequence[:context]], prefill_chunk=context // 2)
        hidden = [decoder.hidden]
        for token in ids[context:]:
            decoder.append(token.unsqueeze(0))
            hidden.append(decoder.hidden)
    error = _error(torch.cat(hidden), whole[context - 1 :])
    stack.bench.check(f"{new} tokens after {context}: error over a full forward", error, at_most=LIMIT)


def _error(x: Tensor, other: Tensor) -> float:
    return float((x.double() - other.double()).norm() / other.double().norm())


# --- Decoding ---


def _decode(stack: Stack, context: int) -> None:
    bench = stack.bench
    if bench.left < 2:
        return bench.skip("contexts", f"no time was left for decoding at {context}")
    seconds = [_step_seconds(stack, context, layers) for layers in stack.depths]
    whole = extrapolated(stack.depths, seconds)
    floor = read_bytes(stack.model, context, LAYERS) / copy_bandwidth(bench.device)
    bench.figures(
        f"decoding at {context} tokens",
        **_by_depth(stack, seconds),
        tokens_per_second=round(1 / whole, 2),
        floor_tokens_per_second=round(1 / floor, 2),
        cache_gib=round(LAYERS * _cache_bytes(stack.model, context) / 2**30, 2),
    )
    if bench.on_cuda:  # small stacks lie in a CPU's caches, which are faster than its memory
        bench.check(f"decoding at {context} tokens: floor over measured", floor / whole, at_most=1.05)
    what = f"decoding at {context} tokens, extrapolated to {LAYERS} layers: share of the floor's speed"
    bench.goal(what, floor / whole, at_least=DECODING, explain=lambda: _explain_step(stack, context))
    return None


def extrapolated(depths: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of 32 layers by those of two depths; not less than the deeper's, where both differ by noise alone."""
    (few, more), (first, second) = depths, seconds
    return max(second, first + (second - first) / (more - few) * (LAYERS - few))


def _by_depth(stack: Stack, seconds: Sequence[float]) -> dict[str, Any]:
    measured = {str(layers): round(value, 6) for layers, value in zip(stack.depths, seconds)}
    return {"seconds_by_layers": measured, "extrapolated_to_layers": LAYERS}


def _step_seconds(stack: Stack, context: int, layers: int) -> float:
    bench = stack.bench
    with stack.of(layers) as model, inference(model):
        decoder = _filled(model, context)
        seconds = seconds_of(_step(decoder), bench.device, rounds=bench.size(15, 3))
        if layers == stack.depths[-1]:
            what = f"a step at {context} tokens: error over the same with its keys in two parts"
            bench.check(what, _in_two_parts(decoder), at_most=LIMIT)
    return seconds


def _step(decoder: Decoder) -> Callable[[], Tensor]:
    """A step of greedy text: a token's id in, the next one's out."""
    ids = torch.zeros(1, dtype=torch.int64, device=decoder.device)

    def step() -> Tensor:
        decoder.append(ids)
        return decoder.logits(0, IDS["text"]).argmax(dim=-1)

    return step


def _filled(model: LlamaForCausalLM, context: int) -> Decoder:
    """A decoder whose cache holds so many tokens, of drawn keys and values, with room for the steps that are timed."""
    decoder = Decoder(model, [np.zeros(1, np.int64)], room=context + STEPS)
    (row,) = decoder.cache.rows
    (extent,) = row.extents
    for kv in extent.slab.kv:
        kv[:, :, extent.start : extent.start + context].normal_()
    extent.used, extent.room = context, extent.room + extent.used - context
    row.length = context
    return decoder


def _in_two_parts(decoder: Decoder) -> float:
    """Error of a step's hidden state over that of the same step of a fork, which merges two ranges of keys."""
    ids = torch.zeros(1, dtype=torch.int64, device=decoder.device)
    fork = decoder.fork([0])
    fork.append(ids)  # makes room of its own
    fork = decoder.fork([0])
    fork.append(ids)
    decoder.append(ids)
    return _error(decoder.hidden, fork.hidden)


def _explain_step(stack: Stack, context: int) -> Row:
    """Of the deeper stack."""
    layers = stack.depths[-1]
    with stack.of(layers) as model, inference(model):
        step = _step(_filled(model, context))
        step()
        return explained(step, stack.bench.device, flops=0, bytes=read_bytes(model, context, layers))


def read_bytes(model: LlamaForCausalLM, context: int, layers: int) -> float:
    """What a step has to read: the weights of so many layers, of the head's text ids, and the cache."""
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    head = model.lm_head.weight[: IDS["text"]].nbytes + model.model.norm.weight.nbytes
    return float(layers * (layer + _cache_bytes(model, context)) + head)


def _cache_bytes(model: LlamaForCausalLM, context: int) -> int:
    """Of one layer."""
    attention = model.model.layers[0].self_attn
    of_token = attention.k_proj.out_features + attention.v_proj.out_features
    return context * of_token * attention.k_proj.weight.element_size()


# --- Prefill ---


def _prefills(stack: Stack, context: int) -> None:
    """By the decoder, and by one forward of transformers without a cache; their results have to agree."""
    bench = stack.bench
    prompt = np.random.default_rng(1).integers(0, IDS["text"], context)
    hidden = []
    for way, enter in (("the decoder in chunks", _in_chunks), ("transformers at once", _at_once)):
        if bench.on_cuda and bench.left < 2 + 15 * (context / CONTEXTS[-1]) ** 2:  # seconds of three layers, with room
            return bench.skip("contexts", f"no time was left for a prefill of {context} by {way}")
        hidden.append(_prefill(stack, prompt, way, partial(enter, bench.size(4096, 16))))
    what = f"prefill of {context} tokens: error of one way over the other's"
    bench.check(what, _error(*hidden), at_most=LIMIT)
    return None


def _in_chunks(chunk: int, model: LlamaForCausalLM, prompt: np.ndarray) -> Tensor:
    return Decoder(model, [prompt], prefill_chunk=chunk).hidden


def _at_once(_: int, model: LlamaForCausalLM, prompt: np.ndarray) -> Tensor:
    ids = torch.from_numpy(prompt).to(model.lm_head.weight.device).unsqueeze(0)
    positions = torch.arange(len(prompt), device=ids.device).unsqueeze(0)
    return model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, -1]


def _prefill(
    stack: Stack, prompt: np.ndarray, way: str, enter: Callable[[LlamaForCausalLM, np.ndarray], Tensor]
) -> Tensor:
    """Says what it took; returns the last hidden state [1, D] of the deeper stack."""
    bench, context = stack.bench, len(prompt)
    hidden: list[Tensor] = []

    def run(layers: int) -> None:
        with stack.of(layers) as model, inference(model):
            hidden[:] = [enter(model, prompt)]

    warm_up = 1 if context < LONG else 0
    rounds = bench.size(3 if context < LONG else 1, 1)
    seconds = [seconds_of(lambda: run(layers), bench.device, rounds, warm_up) for layers in stack.depths]  # noqa: B023
    deeper = hidden[0]
    whole = extrapolated(stack.depths, seconds)
    operations, what = _operations(stack.model, context, LAYERS), f"prefill of {context} tokens by {way}"
    mfu = operations / whole / _peak(bench)
    check_share(bench, what, operations / whole / matrix_peak(bench.device))
    bench.figures(what, **_by_depth(stack, seconds), seconds=round(whole, 4))

    def explain() -> Row:
        few = stack.depths[0]
        flops, read = _operations(stack.model, context, few), read_bytes(stack.model, context, few)
        return explained(lambda: run(few), bench.device, flops, read)

    bench.goal(f"{what}, extrapolated to {LAYERS} layers: MFU", mfu, at_least=PREFILL, explain=explain)
    return deeper


def _operations(model: LlamaForCausalLM, context: int, layers: int) -> float:
    """Of a forward over one document, without the head."""
    config = copy.copy(model.config)
    config.num_hidden_layers = layers
    return step_flops(config, context, context * (context + 1) // 2, {}, backward=False)


def _peak(bench: Bench) -> float:
    """Operations a second by the data sheet; of a device that it does not name, as measured."""
    named = peak_flops(torch.cuda.get_device_name(bench.device)) if bench.on_cuda else None
    return named or matrix_peak(bench.device)
