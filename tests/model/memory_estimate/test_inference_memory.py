"""What a context takes of a rank, predicted: beside the allocator's peaks in real processes, and of LWM-7B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from benchmarks.allocations import peak_bytes
from model.inference.kv_decoder import Decoder
from model.inference.split_weights import split_llama
from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights
from model.llama.llama import build_llama, inference
from model.memory_estimate.inference import InferenceSettings, least_ranks, plan_inference
from tests.model.attention_groups import run_in_processes

CHUNK = 128
CONTEXTS = (768, 1536, 3072)
VARIED = (
    InferenceSettings(768, itemsize=2),
    InferenceSettings(768, itemsize=4, cache="int8"),
    InferenceSettings(768, itemsize=4, split=True),
)
LWM = llama_config("7B", 32_000, 2**20, 5e7)
GIB = 2**30


def config(kv_heads: int) -> LlamaConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    return llama_config({**sizes, "num_key_value_heads": kv_heads}, 96, 8192, 1e4)


def cases(ranks: int) -> list[tuple[LlamaConfig, InferenceSettings]]:
    """Three contexts for each rank, one of them without grouped heads, and further ways to keep things."""
    grown = [InferenceSettings(context, itemsize=4) for context in CONTEXTS]
    given = {"ranks": ranks, "new_tokens": 8, "chunk": CHUNK}
    every = [*((2, one) for one in grown), (4, grown[1]), *((2, one) for one in VARIED)]
    return [(config(kv_heads), replace(one, context=one.context * ranks, **given)) for kv_heads, one in every]


def peaks(group: Any, ranks: int) -> list[int]:
    """Bytes of the weights and at the peak of a prefill and a token after it, by case."""
    found = []
    for config, one in cases(ranks):
        dtype = torch.bfloat16 if one.itemsize == 2 else torch.float32
        if one.split:
            model = split_llama(RandomWeights(config, 0), group, dtype)
        else:
            model = build_llama(config, 0, dtype=dtype)
        prompt = np.arange(one.context) % 90

        def answer(model: Any = model, prompt: Any = prompt, one: Any = one) -> None:
            with inference(model):
                decoder = Decoder(model, [prompt], one.chunk, one.new_tokens, group, one.cache)
                decoder.append(decoder.agreed(decoder.logits(0, 96).argmax(-1)))

        answer()
        found.append(peak_bytes(answer) + sum(p.nbytes for p in model.parameters()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_predicted_peaks_are_those_of_processes_and_linear_in_a_rank_s_tokens(ranks):
    by_rank = [peaks(None, 1)] if ranks == 1 else run_in_processes(peaks, ranks, ranks)
    measured = [max(found) for found in zip(*by_rank)]
    predicted = [plan_inference(config, one, on_cuda=False).peak for config, one in cases(ranks)]
    for (_, one), ours, theirs in zip(cases(ranks), predicted, measured, strict=True):
        assert abs(ours / theirs - 1) < 0.05, one
    small, middle, large = measured[:3]
    assert abs((large - middle) / (2 * (middle - small)) - 1) < 0.05


def test_keys_and_values_of_lwm_7b_are_half_a_mebibyte_a_token_over_all_ranks():
    for ranks in (1, 8, 64):
        memory = plan_inference(LWM, InferenceSettings(2**20, ranks), on_cuda=True)
        assert memory.parts["keys and values"] == 2**20 * 512 * 2**10 // ranks
        assert memory.parts["weights"] == 2 * 6_738_415_616
        assert memory.parts["a chunk's activations"] < 2.5 * GIB
    scaled = plan_inference(LWM, InferenceSettings(2**20, 8, cache="int8"), on_cuda=True)
    assert scaled.parts["keys and values"] == 2**17 * 64 * 32 * (128 + 4)
    split = plan_inference(LWM, InferenceSettings(2**20, 8, split=True), on_cuda=True)
    assert split.parts["weights"] < 2 * 6_738_415_616 / 8 * 1.001


def test_a_million_tokens_need_as_many_devices_as_their_keys_do():
    def least(device: float, **kept: Any) -> int | None:
        found = least_ranks(LWM, InferenceSettings(2**20, **kept), int(device * GIB), on_cuda=True)
        return found and found[0]

    assert (least(75), least(135)) == (16, 8)
    assert least(75, split=True) == 8  # 64 GiB of keys and 2 of weights
    assert least(75, cache="int8", split=True) == 4
    assert least(13) is None  # the weights alone take more
    assert least(22, split=True) == 32
