"""model/layers/activation_checkpointing.py: what each choice computes again, holds at its peak, and refuses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from model.attention import flash_kernels as kernels
from model.layers.activation_checkpointing import apply_memory_settings
from model.layers.memory_settings import MemorySettings
from model.llama.config import llama_config
from model.llama.llama import build_llama
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import Dispatcher, RankBatch
from testing.law_batch import VOCABULARY, tiny_llama
from tests.model.peak_memory import Widths, peak_bytes
from tokenization.loader.batch import MicroBatch

N_TOKENS = 1024
LAYERS = 3
CHOICES = {
    "keep": MemorySettings(),
    "mlp": MemorySettings("mlp"),
    "all-but-attention": MemorySettings("all-but-attention"),
    "full": MemorySettings("full"),
    "tiled": MemorySettings("full", mlp_tile=64),
}


def batch() -> RankBatch:
    """Two documents of N_TOKENS in all, every token a target, text and vision in turns."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, N_TOKENS, dtype=np.int32)
    cu_seqlens = np.array([0, N_TOKENS // 3, N_TOKENS], np.int32)
    return Dispatcher()(MicroBatch(tokens, np.roll(tokens, -1), np.ones(N_TOKENS, np.float32), cu_seqlens, ()))


def lean_llama(settings: MemorySettings):
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = llama_config({**sizes, "num_key_value_heads": 2}, VOCABULARY.sizes, N_TOKENS, 1e6)
    model = build_llama(config, seed=0)
    apply_memory_settings(model, settings)
    return model


def gradients(settings: MemorySettings) -> dict[str, torch.Tensor]:
    model = lean_llama(settings)
    micro_batch_loss(model, batch())[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("choice", [*CHOICES, "offloaded"])
def test_no_choice_changes_a_gradient(choice):
    settings = CHOICES.get(choice, MemorySettings("all-but-attention", offload_activations=True))
    expected, found = gradients(MemorySettings()), gradients(settings)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].norm()))


def test_a_tiled_mlp_is_summed_in_fp32_under_bf16():
    """Many tiles: their weight gradients summed in bf16 would lose what fp32 keeps."""
    mlp = lean_llama(MemorySettings(mlp_tile=8)).bfloat16().model.layers[0].mlp
    plain = lean_llama(MemorySettings()).bfloat16().model.layers[0].mlp.double()
    x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mlp(x).sum().backward()
    plain(x.double()).sum().backward()
    for ours, exact in zip(mlp.parameters(), plain.parameters(), strict=True):
        assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < 5e-3


@pytest.mark.parametrize(("choice", "times"), [("keep", 1), ("mlp", 1), ("all-but-attention", 1), ("full", 2)])
def test_attention_runs_twice_only_where_nothing_of_it_is_kept(choice, times, monkeypatch):
    calls = Counter()
    forward = kernels._cpu_forward

    def counted(*args, **kwargs):
        calls["forward"] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(kernels, "_cpu_forward", counted)
    model, rank_batch = lean_llama(CHOICES[choice]), batch()
    loss = micro_batch_loss(model, rank_batch)[0]
    documents = 2
    assert calls["forward"] == LAYERS * documents
    loss.backward()
    assert calls["forward"] == LAYERS * documents * times


def test_each_choice_holds_less_than_the_one_before():
    def peak(settings: MemorySettings) -> int:
        model, rank_batch = lean_llama(settings), batch()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return peak_bytes(lambda: micro_batch_loss(model, rank_batch, chunk=64)[0].backward())

    peaks = [peak(settings) for settings in CHOICES.values()]
    assert peaks == sorted(peaks, reverse=True)
    row = 4 * N_TOKENS * 64
    assert peaks[1] - peaks[2] > 2 * LAYERS * row  # norms' results, queries, keys and values
    assert peaks[2] - peaks[3] > 0.8 * (LAYERS - 1) * row  # the attention's output
    assert peaks[3] - peaks[4] > 4 * N_TOKENS * 512  # the wide rows of one MLP


@pytest.mark.parametrize("choice", CHOICES)
def test_logits_of_all_tokens_never_exist(choice):
    model, rank_batch = lean_llama(CHOICES[choice]), batch()
    chunk = 64
    seen = []

    class Shapes(Widths):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(tuple(x.shape) for x in [out] if isinstance(x, torch.Tensor))
            return out

    with Shapes():
        micro_batch_loss(model, rank_batch, chunk=chunk)[0].backward()
    wide = {VOCABULARY.text_size, VOCABULARY.size - VOCABULARY.text_size, VOCABULARY.size}
    rows = [shape[0] for shape in seen if len(shape) == 2 and shape[1] in wide]
    assert max(rows) == chunk


def test_evaluation_keeps_nothing_and_needs_no_choice():
    expected = None
    for settings in CHOICES.values():
        model = lean_llama(settings).eval()
        with torch.no_grad():
            loss = micro_batch_loss(model, batch())[0]
        expected = loss if expected is None else expected
        torch.testing.assert_close(loss, expected)


def test_a_lean_model_has_the_weights_names_of_a_plain_one():
    model = tiny_llama()
    names = list(model.state_dict())
    apply_memory_settings(model, MemorySettings("full", mlp_tile=8))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"activations": "some"}, "activations must be one of"),
        ({"activations": "mlp", "offload_activations": True}, "choose all-but-attention or full"),
        ({"mlp_tile": 0}, "mlp_tile must be 1 or more"),
    ],
)
def test_choices_that_contradict_themselves_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        MemorySettings(**wrong)


def test_what_a_zero_stage_cannot_offload_is_told():
    assert MemorySettings(offload_parameters=True).unfit_for(2).startswith("offload_parameters needs ZeRO stage 3")
    assert MemorySettings(offload_optimizer=True).unfit_for(0).startswith("offload_optimizer needs ZeRO stage 1, 2")
    assert MemorySettings(offload_optimizer=True, offload_parameters=True).unfit_for(3) is None


def test_a_tiled_mlp_is_swiglu():
    model = tiny_llama()
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="drop mlp_tile"):
        apply_memory_settings(model, MemorySettings(mlp_tile=8))
