"""Plots: every axis says what it shows, colours are the page's, the same numbers make the same bytes."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.report import svg_style as ink
from pipelines.report.figures import heldout_bars, needle_maps, smoothed, training_curves

PER_STEP = {
    "loss": [9.0, 8.0],
    "lr": [0.0, 1e-3],
    "grad_norm": [2.0, float("nan")],
    "tokens": [512, 512],
    "seconds": [1.0, 2.0],
    "text_nats": [900.0, 0.0],
    "text_targets": [100, 0],
    "vision_nats": [0.0, 0.0],
    "vision_targets": [0, 0],
}
HELDOUT = [{"step": 1, "loss": 8.5, "text_nats": 700.0, "text_targets": 100, "vision_nats": 0.0, "vision_targets": 0}]
TRAINING = [{"stage": name, "tokens": 1024, "per_step": PER_STEP, "heldout": HELDOUT} for name in ("first", "second")]
ROW = {"stage": "first", "source": "all", "modality": "text", "nats_per_token": 5.25}
ROWS: list[dict[str, Any]] = [{**ROW, "unigram_heldout": 6.0, "unigram_train": 6.5}]
NEEDLE = [
    {
        "context": context,
        "depths": [0.0, 1.0],
        "accuracy": [1.0, 0.5],
        "digit_nats": [0.2, 1.0],
        "digit_nats_without": 2.3,
        "choice_nats": [None, None],
        "choice_nats_without": None,
    }
    for context in (1024, 4096)
]
FIGURES = {
    "training": (
        lambda: training_curves(TRAINING, ROWS),
        ["loss, nats a token", "tokens/s", "grad norm", "learning rate", "held out, while training"],
    ),
    "heldout": (lambda: heldout_bars(ROWS), ["nats a token (lower is better)", "5.25", "unigram of training shards"]),
    "needle": (lambda: needle_maps(NEEDLE, 1024), ["depth of the needle", "no needle", "4K*", "0.50"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_its_axes_show_in_colours_of_the_page(name: str) -> None:
    make, words = FIGURES[name]
    svg = make()
    root = ElementTree.fromstring(svg)
    texts = {"".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")}
    assert set(words) <= texts
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]|#fe00", svg)
    assert "var(--ink)" in svg
    assert svg == make()
    assert all(node.get("id", name).startswith(name) for node in root.iter())


def test_stage_names_stand_over_their_part_of_the_axis_of_tokens() -> None:
    texts = training_curves(TRAINING, [])
    assert ">first<" in texts
    assert ">second<" in texts
    assert "tokens trained on, all stages" in texts


def test_without_a_measurement_while_training_none_is_drawn_or_named() -> None:
    unmeasured = [{**stage, "heldout": []} for stage in TRAINING]
    assert "held out, while training" not in training_curves(unmeasured, ROWS)


def test_smoothing_is_unbiased_at_the_ends_lags_behind_nothing_and_passes_over_steps_without_a_value() -> None:
    values = np.array([4.0, np.nan, *[4.0] * 198])
    np.testing.assert_allclose(smoothed(values), 4.0)
    ramp = np.arange(300.0)
    np.testing.assert_allclose(smoothed(ramp)[20:-20], ramp[20:-20])
    noisy = np.random.default_rng(0).normal(3, 1, 500)
    assert np.std(smoothed(noisy)[100:]) < 0.5 * np.std(noisy)
    assert np.isnan(smoothed(np.array([np.nan]))).all()


def test_heat_is_clipped_to_its_range() -> None:
    assert ink.heat(-1) == "#fe0000"
    assert ink.heat(0.5) == "#fe0032"
    assert ink.heat(7) == "#fe0064"
