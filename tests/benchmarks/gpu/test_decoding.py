"""The part that times decoding and prefill fails where operations are miscounted or less than a model is run."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from benchmarks.gpu.fast import decoding
from model.attention import hf_interface
from model.inference.kv_decoder import Decoder
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
    advance = Decoder._advance

    def shallow(self: Any, ids: Tensor, *args: Tensor) -> None:
        config = self.model.config
        config.num_hidden_layers -= ids.shape[1] == 1
        advance(self, ids, *args)
        config.num_hidden_layers += ids.shape[1] == 1

    patch.setattr(Decoder, "_advance", shallow)


def _half_the_cache(patch: pytest.MonkeyPatch) -> None:
    update = DynamicLayer.update

    def half(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = keys.shape[2] == 1
        keys, values = update(self, keys, values, *args, **kwargs)
        start = keys.shape[2] // 2 if one else 0
        return keys[:, :, start:], values[:, :, start:]

    patch.setattr(DynamicLayer, "update", half)


def _older_keys_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hf_interface, "attend_", lambda *args: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_doubled_operations, "operations"),
        (_skipped_layer, "tokens after"),
        (_half_the_cache, "tokens after"),
        (_older_keys_left_out, "another kernel's"),
    ],
)
def test_a_wrong_measurement_fails(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("decoding")
    assert done.last["kind"] == "failed"
    assert any(shows_in in what for what in done.broken), done.broken
