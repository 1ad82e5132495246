"""The layers part: a layer by any kernels is stock transformers' layer, or the part fails."""

from __future__ import annotations

import pytest
from torch import Tensor

from model.layers.activation_checkpointing import RecomputingDecoderLayer
from model.layers.kernels import torch_compile
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
def test_kernels_are_held_against_a_stock_layer_and_against_each_other() -> None:
    rehearsal = rehearse("layers")
    assert rehearsal.passed, rehearsal.last
    rows = rehearsal.rows
    checks = [row["what"] for row in rows if row["kind"] == "check" and "stock" in row["what"]]
    assert [what.partition(":")[0] for what in checks] == [
        *("torch, everything kept", "compile, everything kept"),
        *("torch, as the recipes", "compile, as the recipes"),
    ]
    assert [row["what"] for row in rows if row["kind"] == "skipped"] == ["liger"]
    assert all(set(row["milliseconds"]) == {"torch", "compile"} for row in rows if row["kind"] == "figures")


@pytest.mark.slow
def test_a_sign_in_one_choice_of_kernels_fails_that_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_compile._turned
    monkeypatch.setattr(torch_compile, "_turned", lambda x, cos, sin: right(x, cos, -sin))
    why = rehearse("layers").last["why"]
    assert "compile, everything kept: output and gradients" in why
    assert "torch, " not in why


@pytest.mark.slow
def test_a_layer_without_its_mlp_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def skipped(self: RecomputingDecoderLayer, hidden: Tensor) -> Tensor:
        return hidden + 0 * self.mlp(self.post_attention_layernorm(hidden))

    monkeypatch.setattr(RecomputingDecoderLayer, "_feed_forward", skipped)
    assert "torch, everything kept: output and gradients" in rehearse("layers").last["why"]
