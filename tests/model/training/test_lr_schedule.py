"""model/training/lr_schedule.py against the rates that LWM's released optimizer reported, and at its corners."""

from __future__ import annotations

import pytest

from model.training.lr_schedule import Schedule

# Reported by LWM's released trainer over four steps with lr 5e-3, end_lr 1e-3, 2 warm-up and 10 decay steps. It reports
# the schedule after counting the step, that is at s + 1, though its s-th update was made with the rate at s.
LWM_REPORTED = [0.0025, 0.005, 0.00484776, 0.00441421]


def test_cosine_equals_the_released_schedule():
    schedule = Schedule(peak=5e-3, kind="cosine", warmup_steps=2, decay_steps=10, final=1e-3)
    assert [schedule(s + 1) for s in range(4)] == pytest.approx(LWM_REPORTED, rel=2e-6)


def test_first_update_under_warm_up_has_rate_zero():
    assert Schedule(peak=4e-5, warmup_steps=100)(0) == 0.0


def test_warm_up_is_linear_and_ends_at_the_peak():
    schedule = Schedule(peak=4e-5, warmup_steps=100)
    assert schedule(25) == pytest.approx(1e-5)
    assert schedule(100) == 4e-5
    assert schedule(1200) == 4e-5


def test_without_warm_up_the_first_update_has_the_peak():
    assert Schedule(peak=8e-5)(0) == 8e-5
    assert Schedule(peak=6e-4, kind="cosine", decay_steps=10)(0) == 6e-4


def test_cosine_is_half_way_in_the_middle_and_stays_at_the_final_rate():
    schedule = Schedule(peak=6e-4, kind="cosine", warmup_steps=1000, decay_steps=45000, final=6e-5)
    assert schedule(1000) == pytest.approx(6e-4)
    assert schedule(23000) == pytest.approx((6e-4 + 6e-5) / 2)
    assert schedule(45000) == pytest.approx(6e-5)
    assert schedule(10**6) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "cosine"},
        {"kind": "cosine", "warmup_steps": 10, "decay_steps": 10},
        {"warmup_steps": -1},
        {"kind": "linear"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        Schedule(peak=1.0, **wrong)
