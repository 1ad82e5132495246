"""The part that times decoding and prefill fails where operations are miscounted or less than a model is run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks.gpu.fast import decoding
from model.attention import flash_kernels
from model.attention.plan.runs import Runs
from model.inference import kv_decoder
from model.inference.kv_cache import KVCache
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
def test_decoding_and_prefill_are_timed_and_a_missed_goal_is_explained() -> None:
    done = rehearse("decoding")
    assert done.passed, done.last
    assert len(done.of("goal")) == 2 + 4
    for goal in done.of("goal"):
        assert goal["met"] or (goal["profile"] and goal["floor_seconds"] > 0)
    for row in done.of("figures"):
        assert row["extrapolated_to_layers"] == 32
        assert len(row["seconds_by_layers"]) == 2


def test_what_32_layers_take_lies_on_the_line_through_two_depths() -> None:
    assert decoding.extrapolated((2, 4), (0.5, 0.7)) == pytest.approx(0.3 + 32 * 0.1)
    assert decoding.extrapolated((2, 4), (0.5, 0.4)) == 0.4


def _doubled_operations(patch: pytest.MonkeyPatch) -> None:
    reckoned = decoding.step_flops
    patch.setattr(decoding, "step_flops", lambda *args, **kwargs: 2 * reckoned(*args, **kwargs))


def _skipped_layer(patch: pytest.MonkeyPatch) -> None:
    forward = kv_decoder.final_hidden

    def shallow(model: Any, ids: Tensor, *args: Any) -> Tensor:
        whole = model.model.layers
        model.model.layers = whole[: len(whole) - (len(ids) == 1)]
        try:
            return forward(model, ids, *args)
        finally:
            model.model.layers = whole

    patch.setattr(kv_decoder, "final_hidden", shallow)


def _half_the_cache(patch: pytest.MonkeyPatch) -> None:
    reads = KVCache.reads

    def half(self: Any, queries: Any, *args: Any) -> Any:
        found = reads(self, queries, *args)
        if [n for _, n in queries] != [1]:
            return found
        parts = tuple(
            part._replace(runs=Runs(run._replace(k_start=(run.k_start + run.k_end) // 2) for run in part.runs))
            for part in found.parts
        )
        return found._replace(parts=parts)

    patch.setattr(KVCache, "reads", half)


def _parts_not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flash_kernels, "merge_", lambda *args: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_doubled_operations, "operations"),
        (_skipped_layer, "tokens after"),
        (_half_the_cache, "tokens after"),
        (_parts_not_merged, "in two parts"),
    ],
)
def test_a_wrong_measurement_fails(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("decoding")
    assert done.last["kind"] == "failed"
    assert any(shows_in in what for what in done.broken), done.broken
