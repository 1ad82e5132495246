"""The part that measures the longest context fails where the prediction lacks a term, and runs on a card's own path."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu.long import context
from benchmarks.gpu.part import Bench
from benchmarks.gpu.parts import chosen
from model.memory_estimate import plan
from tests.benchmarks.gpu.rehearsal import rehearse

SECONDS = 600.0  # of a busy machine


@pytest.mark.slow
@pytest.mark.faults
def test_what_is_predicted_is_measured() -> None:
    done = rehearse("longest", SECONDS)
    assert done.passed, done.last
    assert len(done.of("check")) == 6
    predicted, extrapolated = done.of("figures")
    assert "extrapolated" in extrapolated["what"]
    assert predicted["tokens"] > extrapolated["tokens"] / 2 > 0


def _no_layer_at_work(patch: pytest.MonkeyPatch) -> None:
    reckoned = plan.activation_bytes
    patch.setattr(plan, "activation_bytes", lambda *args: replace(reckoned(*args), mlp=0, attention=0))


def _nothing_offloaded(patch: pytest.MonkeyPatch) -> None:
    reckoned = plan.zero_bytes
    patch.setattr(plan, "zero_bytes", lambda *args: replace(reckoned(*args), offloaded={}))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, _no_layer_at_work, _nothing_offloaded])
def test_a_prediction_without_a_term_fails(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one context alone, for time."""
    monkeypatch.setattr(context, "_of_model", lambda study, filling: context._measure(study, 2, (2048,)))
    if wrong is not None:
        wrong(monkeypatch)
    done = rehearse("longest", SECONDS)
    assert done.passed == (wrong is None)
    assert bool(done.broken) == (wrong is not None)


def test_a_step_of_the_7b_is_given_the_time_that_its_operations_take() -> None:
    (part,) = chosen(["longest"])
    bench = Bench(part, torch.device("cpu"), False, 0.0, print)
    study = context.Study(bench, "7B", context.MODELS["LWM-7B, 32 heads of keys"], context._settings(context.OFFLOADED))
    steps = context.Steps(study, 2)
    assert 3 < steps._seconds(65_536) < steps._seconds(196_608) < 20


def test_a_plane_through_two_depths_and_two_contexts_is_exact_for_what_is_linear_in_both() -> None:
    def peak(layers: int, tokens: int) -> int:
        return 7 + 5 * layers + 3 * tokens + 2 * layers * tokens

    peaks = {layers: {tokens: peak(layers, tokens) for tokens in (10, 30)} for layers in (2, 4)}
    assert context.plane(peaks, 32, 1000) == peak(32, 1000)
    assert context.longest(lambda tokens: context.plane(peaks, 32, tokens) <= peak(32, 640), 64) == 640


@pytest.mark.slow
def test_the_path_of_a_card_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card's counters in its place: what it says, skips and holds."""
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 6000)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", dict)
    rows: list[dict[str, Any]] = []
    (part,) = chosen(["longest"])
    bench = Bench(part, torch.device("cpu"), True, time.monotonic() + SECONDS, rows.append)
    study = context.Study(bench, "tiny", context.TINY, context._settings(context.OFFLOADED))
    steps = context.Steps(study, 2, host_at=512)
    monkeypatch.setattr(context.Steps, "_seconds", lambda self, tokens: 0.0 if tokens == 512 else math.inf)
    assert steps.on_card((512, 1024)) == {512: 4000}
    assert [row["kind"] for row in rows] == ["figures", "check", "skipped"]
    assert steps.engine is None
