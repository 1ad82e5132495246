"""The waits part: where a step asks a card for values, and that a layer which does so fails it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.fast.waits import _Operators, _place
from model.layers.activation_checkpointing import RecomputingDecoderLayer
from model.training.engine import TrainingEngine
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
@pytest.mark.faults
def test_a_step_waits_for_the_loss_of_each_modality_and_for_the_norm_whatever_its_layers() -> None:
    rehearsal = rehearse("waits")
    assert rehearsal.passed, rehearsal.last
    rows = rehearsal.rows
    for row in rows:
        if row["kind"] == "figures":
            ours: Counter[str] = Counter()
            for place, n in row["places"].items():
                ours[place.partition(":")[0]] += n
            assert {place: n for place, n in ours.items() if place.startswith("model/")} == {
                "model/llama/loss.py": 2,
                "model/training/engine.py": 1,
            }
            assert not any("timer.py" in place for place in ours), "DeepSpeed's timers wait for the card"
    goals = [row for row in rows if row["kind"] == "goal"]
    assert [row["met"] for row in goals] == [True, True]


@pytest.mark.slow
@pytest.mark.faults
def test_a_layer_that_asks_for_a_value_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RecomputingDecoderLayer._feed_forward

    def asks(self: RecomputingDecoderLayer, hidden: Tensor) -> Tensor:
        hidden.detach().sum().item()
        return right(self, hidden)

    monkeypatch.setattr(RecomputingDecoderLayer, "_feed_forward", asks)
    assert "waits that two more layers add, by operators" in rehearse("waits").last["why"]


@pytest.mark.slow
@pytest.mark.faults
def test_steps_that_are_not_made_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingEngine, "train_step", TrainingEngine.eval_step)
    assert "steps made while counting" in rehearse("waits").last["why"]


def test_operators_that_wait_for_a_card_are_told_from_those_that_do_not() -> None:
    x = torch.arange(4.0)
    places: Counter[str] = Counter()
    with _Operators(x.device, places):
        x.sum().item()
        x[x > 1]
        (x > 1).nonzero()
        x[torch.tensor([0, 2])]
        x.where(x > 1, 0).sum()
    assert sum(places.values()) == 3
    assert all("test_waits.py" in place for place in places)
    assert "test_waits.py" in _place()


def test_copies_to_the_host_wait_unless_they_need_not() -> None:
    operators = _Operators(torch.device("cuda"), Counter())
    aten = torch.ops.aten
    with torch._subclasses.FakeTensorMode():
        there, here = (torch.empty(2, device=device) for device in ("cuda", "cpu"))
        assert operators._waits(aten._to_copy, (there,), {"device": torch.device("cpu")})
        assert not operators._waits(aten._to_copy, (there,), {"device": torch.device("cpu"), "non_blocking": True})
        assert not operators._waits(aten._to_copy, (there,), {"dtype": torch.float64})
        assert operators._waits(aten.copy_, (here, there), {})
        assert not operators._waits(aten.copy_, (here, there, True), {})
        assert not operators._waits(aten.copy_, (there, here), {})
        assert not operators._waits(aten._local_scalar_dense, (here,), {})
        assert operators._waits(aten._local_scalar_dense, (there,), {})
