"""Cached decoding on the card, chunk by chunk and token by token, held against the full forward of the same model.

A case is a batch of prompts that enters in chunks, is extended token by token, and may go on with some of its rows. Its
logits are those that generation draws from. Exact is the full forward in fp32, of each sequence alone and without a
cache. In bf16 the error of the full forward in bf16 is the yardstick: a cache adds no rounding, so its error may not be
larger but for the order of sums, which kernels for one row may take in parts. The weights are larger than a fresh
model's, so that attention is as sharp as a trained model's and one wrong position or key shows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from benchmarks.gpu.part import Bench
from model.inference.kv_decoder import Decoder
from model.llama.config import llama_config
from model.llama.llama import build_llama, inference

RATIO = 1.5
"""In bf16: largest error over that of the full forward in bf16."""
FP32_LIMIT = 5e-5
"""In fp32: largest relative error, of sums in another order."""
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"text": 600, "vision": 400}
DRAWN = (600, 1000)
"""The ids whose logits are compared: as where codes of a frame are drawn."""


@dataclass(frozen=True)
class Case:
    """lengths: of the prompts. steps: tokens appended. kept: rows that go on after that for as many steps more."""

    name: str
    lengths: tuple[int, ...]
    chunk: int
    steps: int
    kept: tuple[int, ...] = ()


CASES = (
    Case("a prompt of one token", (1,), 256, 16),
    Case("a prompt in one chunk", (512,), 512, 16),
    Case("a prompt in chunks that do not divide it", (1000,), 256, 16),
    Case("a prompt token by token", (37,), 1, 16),
    Case("prompts of different lengths, then two of them", (1, 7, 500, 777), 256, 12, kept=(3, 1)),
    Case("equal prompts, then one of them", (300, 300), 128, 12, kept=(1,)),
    Case("a long prompt", (10_007,), 4096, 8),
)
TINY_CASES = (
    Case("a prompt of one token", (1,), 8, 4),
    Case("a prompt in chunks that do not divide it", (37,), 8, 4),
    Case("prompts of different lengths, then two of them", (1, 7, 25), 8, 4, kept=(2, 1)),
)


def run(bench: Bench) -> None:
    """Every case in fp32 and in bf16, with as many heads of keys as of queries and with fewer."""
    for kv_heads in bench.size((8, 2), (2,)):
        model, exact = _models(bench, kv_heads)
        for case in bench.size(CASES, TINY_CASES):
            if bench.left < 1:
                return bench.skip("cases", "its time is up")
            sequences = _sequences(case)
            logits = _full(exact, sequences, case)
            name = f"{case.name}, {model.config.num_attention_heads} heads over {kv_heads}"
            bench.check(f"{name}, fp32", _error(_cached(exact, sequences, case), logits), at_most=FP32_LIMIT)
            ratio = _error(_cached(model, sequences, case), logits) / _error(_full(model, sequences, case), logits)
            bench.check(f"{name}, bf16: error over the full forward's in bf16", ratio, at_most=RATIO)
    return None


def _models(bench: Bench, kv_heads: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model in bf16, and the same weights in fp32."""
    sizes: dict[str, Any] = bench.size(SIZES, TINY)
    sharp = {"num_key_value_heads": kv_heads, "initializer_range": 1.3 * sizes["hidden_size"] ** -0.5}
    config = llama_config({**sizes, **sharp}, IDS, context=2**15, rope_theta=5e7)
    model: Any = build_llama(config, seed=kv_heads, dtype=torch.bfloat16)
    model.to(bench.device)
    return model, copy.deepcopy(model).float()


def _sequences(case: Case) -> list[np.ndarray]:
    """Each row's prompt and what is appended to it."""
    generator = np.random.default_rng(sum(case.lengths))
    return [generator.integers(0, sum(IDS.values()), length + 2 * case.steps) for length in case.lengths]


def _rows(case: Case) -> list[list[int]]:
    """By stage of the case, whose rows are decoded in it."""
    return [list(range(len(case.lengths))), *([list(case.kept)] if case.kept else [])]


def _cached(model: LlamaForCausalLM, sequences: Sequence[np.ndarray], case: Case) -> Tensor:
    """fp32 logits [N, n], of every stage, step and row, by the decoder."""
    ends = list(case.lengths)
    with inference(model):
        decoder = Decoder(model, [sequence[:end] for sequence, end in zip(sequences, ends)], case.chunk)
        drawn = [decoder.logits(*DRAWN)]
        for stage, rows in enumerate(_rows(case)):
            if stage:
                decoder.keep(rows)
            for _ in range(case.steps):
                following = [int(sequences[row][ends[row]]) for row in rows]
                decoder.append(torch.tensor(following, device=decoder.device))
                drawn.append(decoder.logits(*DRAWN))
                for row in rows:
                    ends[row] += 1
    return torch.cat(drawn)


def _full(model: LlamaForCausalLM, sequences: Sequence[np.ndarray], case: Case) -> Tensor:
    """The same by one forward a sequence, without a cache, a mask or a batch."""
    with inference(model):
        by_row = [_forward(model, sequence, length) for sequence, length in zip(sequences, case.lengths)]
    step = 0
    drawn = [torch.stack([logits[0] for logits in by_row])]
    for rows in _rows(case):
        for _ in range(case.steps):
            step += 1
            drawn.append(torch.stack([by_row[row][step] for row in rows]))
    return torch.cat(drawn)


def _forward(model: LlamaForCausalLM, sequence: np.ndarray, length: int) -> Tensor:
    """fp32 logits of a sequence from the end of its prompt, of `length` tokens, on."""
    ids = torch.from_numpy(sequence).to(model.lm_head.weight.device).unsqueeze(0)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, length - 1 :]
    return F.linear(hidden, model.lm_head.weight[slice(*DRAWN)]).float()


def _error(logits: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact."""
    return float((logits.double() - exact.double()).norm() / exact.double().norm())
