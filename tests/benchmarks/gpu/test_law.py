"""The part `law` in a rehearsal: what is right passes, and what it is to guard fails it when it is broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.parts import chosen
from benchmarks.gpu.right import law
from benchmarks.gpu.right.law import EVERYTHING, Way
from benchmarks.gpu.run import run_here
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.saved_results import SavedResults
from model.layers import tiled_mlp
from model.layers.kernels.interface import LayerKernels, SwiGLU
from model.layers.memory_settings import MemorySettings
from model.training.engine import TrainingEngine
from model.training.rank_batch import RankBatch
from testing.law_batch import law_text

pytestmark = pytest.mark.slow


def rehearse() -> tuple[dict[str, Any], list[Row]]:
    rows: list[Row] = []
    (part,) = chosen(["law"])
    return run_here(Bench(part, torch.device("cpu"), True, time.monotonic() + 120, rows.append)), rows


def hold(monkeypatch: pytest.MonkeyPatch, *ways: Way, fused: Sequence[Way] = ()) -> None:
    """Leave these ways alone to the part."""
    monkeypatch.setattr(law, "TINY_WAYS", ways)
    monkeypatch.setattr(law, "FUSED", fused)


def why(outcome: dict[str, Any]) -> str:
    assert outcome["kind"] == "failed"
    assert "traceback" not in outcome, outcome["traceback"]
    return outcome["why"]


def test_the_rehearsal_passes_with_every_setting_and_a_margin() -> None:
    outcome, rows = rehearse()
    assert outcome == {"kind": "passed"}, rows
    checks = [row for row in rows if row["kind"] == "check"]
    said = " ".join(row["what"] for row in checks)
    settings = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "2 micro-batches", "activations full", "mlp tile", "compile")
    assert all(setting in said for setting in (*settings, "offload activations", "offload parameters"))
    assert [row["what"] for row in rows if row["kind"] == "skipped"] == ["liger"]
    in_fp32 = [row["measured"] for row in checks if row["what"].startswith("fp32")]
    assert 0 < max(in_fp32) < law.LAW / 2


def test_the_law_is_held_here_on_a_real_play() -> None:
    assert b"Lysander" in law_text()


def halved(accumulate: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, batches, n_examples, *rest: accumulate(self, batches, 2 * n_examples, *rest)


def test_a_gradient_that_is_scaled_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, Way())
    monkeypatch.setattr(TrainingEngine, "accumulate", halved(TrainingEngine.accumulate))
    assert "fp32, ZeRO 2: gradient: 0.5" in why(rehearse()[0])


def test_a_dropped_micro_batch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = TrainingEngine.accumulate

    def all_but_the_last(
        self: TrainingEngine, batches: Sequence[RankBatch], n_examples: int, *rest: Any
    ) -> list[torch.Tensor]:
        last = replace(batches[-1], loss_weight=torch.zeros_like(batches[-1].loss_weight))
        return accumulate(self, [*batches[:-1], last], n_examples, *rest)

    hold(monkeypatch, Way(1, 2))
    monkeypatch.setattr(TrainingEngine, "accumulate", all_but_the_last)
    assert "fp32, ZeRO 1, 2 micro-batches: gradient" in why(rehearse()[0])


def test_a_tile_that_loses_a_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    add = tiled_mlp.add_product_
    hold(monkeypatch, Way(), Way(memory=MemorySettings(mlp_tile=50)))
    monkeypatch.setattr(tiled_mlp, "add_product_", lambda total, grad, rows: add(total, grad[:-1], rows[:-1]))
    reasons = why(rehearse()[0]).split("; ")
    assert reasons
    assert all("mlp tile" in reason for reason in reasons)


def test_positions_that_are_off_by_one_within_a_document_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where they only fail to start over in each document: RoPE turns by differences, so no gradient tells that."""
    positions = SequencePlan.positions.func  # type: ignore[attr-defined]

    def late(plan: SequencePlan) -> np.ndarray:
        exact = positions(plan)
        return exact + (exact > 20)

    hold(monkeypatch, Way())
    monkeypatch.setattr(SequencePlan, "positions", property(late))
    assert "fp32, ZeRO 2: gradient" in why(rehearse()[0])


@pytest.mark.faults
def test_documents_that_attend_across_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = law.rank_batches

    def joined(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            from testing import law_batch

            join = law_batch.join_sequences
            patch.setattr(
                law_batch,
                "join_sequences",
                lambda rows: replace(one := join(rows), cu_seqlens=one.cu_seqlens[[0, -1]]),
            )
            return batches(*arguments)

    hold(monkeypatch, Way())
    monkeypatch.setattr(law, "rank_batches", joined)
    assert "fp32, ZeRO 2: gradient" in why(rehearse()[0])


@pytest.mark.faults
def test_an_attention_that_is_restored_out_of_order_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: SavedResults) -> Any:
        self.results = type(self.results)((out.roll(1, 0), lse) for out, lse in self.results)
        return SavedResults._current(self, is_saving=False)

    hold(monkeypatch, Way(), Way(memory=MemorySettings("all-but-attention", True)))
    monkeypatch.setattr(SavedResults, "restoring", shifted)
    reasons = why(rehearse()[0])
    assert "fp32, ZeRO 2: " not in reasons
    assert "fp32, ZeRO 2, activations all-but-attention, offload activations: gradient" in reasons
    assert "gradients that differ in any bit" in reasons


@pytest.mark.faults
def test_kernels_that_compute_something_else_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.layers import fused_layers

    load = fused_layers.load_kernels

    def wrong(name: Any) -> LayerKernels:
        right = load(name)
        swiglu = SwiGLU(lambda gate, up: right.swiglu.forward(gate, up * 1.001), right.swiglu.backward)
        return replace(right, swiglu=swiglu)

    hold(monkeypatch, Way(), fused=(Way(),))
    monkeypatch.setattr(fused_layers, "load_kernels", wrong)
    reasons = why(rehearse()[0]).split("; ")
    assert all("compile" in reason for reason in reasons)


@pytest.mark.faults
def test_an_update_that_differs_between_stages_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    update = TrainingEngine.update

    def unclipped(self: TrainingEngine) -> tuple[float, float]:
        if self.settings.zero == 1:
            self.deepspeed.optimizer.clip_grad = 1e-3
        return update(self)

    hold(monkeypatch, Way(), Way(1))
    monkeypatch.setattr(TrainingEngine, "update", unclipped)
    reasons = why(rehearse()[0])
    assert "fp32, ZeRO 1: weights after 2 steps" in reasons
    assert "bf16, ZeRO 1: weights after the same update" in reasons


def test_everything_that_saves_memory_is_among_the_ways() -> None:
    for ways in (law.WAYS, law.TINY_WAYS):
        assert EVERYTHING in {way.memory for way in ways}
        assert {way.zero for way in ways} == {0, 1, 2, 3}
