"""The stack part: what is timed is what stock transformers compute, and the operations reckoned are those done."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from benchmarks.gpu.explain import matrix_peak
from benchmarks.gpu.fast import llama
from benchmarks.gpu.fast.llama import RECIPE
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.parts import chosen
from benchmarks.gpu.run import run_here
from model.attention import ring
from model.layers.activation_checkpointing import RecomputingDecoderLayer
from model.layers.memory_settings import MemorySettings
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
@pytest.mark.faults
def test_a_rehearsal_measures_and_extrapolates_and_says_which() -> None:
    rehearsal = rehearse("stack")
    assert rehearsal.passed, rehearsal.last
    rows = rehearsal.rows
    figures = {row["what"]: row for row in rows if row["kind"] == "figures"}
    for kv_heads in (4, 2):
        for context in (32, 64, 128):
            assert figures[f"{kv_heads} kv heads, {context} tokens, 4 of its layers"]["tokens_per_second"] > 0
        longest = figures[f"{kv_heads} kv heads, 1024 tokens, all layers, extrapolated"]
        assert longest["attention_share_of_operations"] > 0.6
    measured = next(row for row in rows if row["kind"] == "goal" and "MFU" in row["what"])
    assert (measured["of"], measured["floor_by"]) == ("a step of one layer", "flops")
    assert 0 < len(measured["profile"]) <= 10


class PretendedCard(Bench):
    """Takes a card's branches on the CPU."""

    @property
    def on_cuda(self) -> bool:
        return True


@pytest.mark.slow
@pytest.mark.faults
def test_a_cards_branches_choose_depths_by_its_memory_and_read_its_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "get_device_name": "NVIDIA H200",
        "mem_get_info": (0, 850 * 2**10),  # for two of the four layers at 128 tokens, and none at 1024
        "memory_allocated": 0,
        "max_memory_allocated": 2**30,
        "max_memory_reserved": 2**31,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    rows: list[Row] = []
    (part,) = chosen(["stack"])
    last = run_here(PretendedCard(part, torch.device("cpu"), True, time.monotonic() + 60, rows.append))
    assert last == {"kind": "passed"}
    figures = {row["what"]: row for row in rows if row["kind"] == "figures"}
    assert [name for name in figures if name.startswith("2 kv heads")] == [
        "2 kv heads, 32 tokens, 4 of its layers",
        "2 kv heads, 64 tokens, 4 of its layers",
        "2 kv heads, 128 tokens, 2 of its layers",
        "2 kv heads, 128 tokens, all layers, extrapolated from 2",
        "2 kv heads, 1024 tokens, all layers, extrapolated",
    ]
    measured = figures["2 kv heads, 128 tokens, 2 of its layers"]
    assert (measured["peak_gib"], measured["reserved_gib"]) == (1, 2)
    assert measured["mfu"] == pytest.approx(
        measured["share_of_matrix_peak"] * matrix_peak(torch.device("cpu")) / 989e12
    )


@pytest.mark.slow
def test_layers_whose_mlps_are_left_out_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def skipped(self: RecomputingDecoderLayer, hidden: Tensor) -> Tensor:
        return hidden + 0 * self.mlp(self.post_attention_layernorm(hidden))[..., :1]

    monkeypatch.setattr(RecomputingDecoderLayer, "_feed_forward", skipped)
    assert "gradient beside stock transformers'" in rehearse("stack").last["why"]


@pytest.mark.slow
def test_an_attention_whose_scale_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring.attend
    monkeypatch.setattr(ring, "attend", lambda q, k, v, runs, scale: right(q, k, v, runs, 0.2))
    assert "gradient beside stock transformers'" in rehearse("stack").last["why"]


@pytest.mark.slow
def test_operations_counted_twice_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama.step_flops
    monkeypatch.setattr(llama, "step_flops", lambda *sizes: 2 * right(*sizes))
    assert "matrix products counted over those reckoned" in rehearse("stack").last["why"]


def test_memory_is_saved_as_the_recipes_do() -> None:
    for name in ("lwm-text-7b", "lwm-vision-7b"):
        recipe = yaml.safe_load(Path(__file__).parents[4].joinpath("recipes", f"{name}.yaml").read_text())
        assert MemorySettings(**recipe["train"]["memory"]) == RECIPE
