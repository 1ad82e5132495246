"""model/training/loss_spikes.py: what is a spike and what is noise."""

from __future__ import annotations

import math

import numpy as np

from model.training.loss_spikes import SpikeDetector


def test_a_spike_stands_out_of_the_losses_before_it() -> None:
    noise = np.random.default_rng(0).normal(3.0, 0.1, 1000)
    detector = SpikeDetector(sigmas=6, window=100)
    for loss in noise:
        assert not detector(loss)
        detector.take(loss)
    assert detector(3.0 + 7 * 0.12)
    assert not detector(3.0 - 1.0), "a fall is no spike"
    assert not detector(math.nan)
    assert not detector(math.inf)


def test_nothing_is_a_spike_before_half_a_window() -> None:
    detector = SpikeDetector(sigmas=3, window=10)
    for _ in range(4):
        detector.take(1.0)
        assert not detector(100.0)
    detector.take(1.0)
    assert detector(100.0)
    assert not detector(1.02), "within three times a hundredth of the mean, though no loss has moved yet"
    assert detector(1.04)


def test_old_losses_are_forgotten_and_the_state_is_the_losses() -> None:
    detector = SpikeDetector(sigmas=3, window=10)
    for loss in [50.0] * 10 + [1.0] * 10:
        detector.take(loss)
    assert detector.losses == [1.0] * 10
    again = SpikeDetector(3, 10, detector.losses)
    assert (again(2.0), again.threshold()) == (True, detector.threshold())
