"""What the report says of tasks at length and of a user's questions: sections, plots and sentences."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.evaluate.task_table import TASKS
from pipelines.report.task_figures import film_map, loss_by_position
from pipelines.report.verdicts import verdicts


def said(task: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Through the report's own road, on which a hole and the like stand beside it."""
    *_, last = verdicts({"further": {task: rows}})
    return last["grade"], last["text"]


def needles(accuracy: float, **changes: Any) -> dict[str, Any]:
    row = {"context": 4096, "hidden": 4, "asked": 2, "rounds": 10, "accuracy": accuracy, "all_right": accuracy}
    return {**row, **changes}


def bins(*nats: float) -> list[dict[str, Any]]:
    edges = [2**power for power in range(len(nats) + 1)]
    return [
        {"context": edges[-1], "windows": 3, "from": a, "to": b - 1, "targets": b - a, "nats_per_token": value}
        for a, b, value in zip(edges, edges[1:], nats)
    ]


def choices(accuracy: float | None, asked: int = 100, chance: float = 0.25) -> dict[str, Any]:
    row = {"name": "mme", "accuracy": accuracy, "accuracy_by_mean": accuracy, "chance": chance, "asked": asked}
    bad = [{"line": 2, "reason": "it has no frame"}]
    return {**row, "of_questions": 101, "left_out": 1, "reasons": bad, "letters": True}


def answers(f1: float | None) -> dict[str, Any]:
    row = {"name": "msvd", "exact": f1, "f1": f1, "contained": f1, "asked": 50, "of_questions": 50}
    return {**row, "left_out": 0, "reasons": []}


def ruler(context: int, mean: float, whole: bool = True) -> dict[str, Any]:
    return {"context": context, "examples": 40, "vt": mean, "fwe": mean, "mean": mean, "is_whole": whole}


def film(*accuracy: float, rounds: int = 20) -> dict[str, Any]:
    depths = [number / (len(accuracy) - 1) for number in range(len(accuracy))]
    row = {"frames": 64, "depths": depths, "rounds": rounds, "by": "recognition", "chance": 0.25}
    gain = [value - 0.25 for value in accuracy]
    return {**row, "accuracy": [*accuracy], "accuracy_without": None, "needle_gain": gain, "others_gain": gain}


@pytest.mark.parametrize(
    ("task", "rows", "grade", "words"),
    [
        ("multi-needle", [needles(0.95), needles(0.9)], "good", "92% of the asked numbers are found over 20 questions"),
        ("multi-needle", [needles(1.0), needles(0.79, hidden=8)], "fair", "79%, of 2 asked among 8 hidden in 4K"),
        ("multi-needle", [needles(0.4)], "bad", "40%"),
        ("ruler", [ruler(4096, 0.9), ruler(8192, 0.86)], "good", "its effective context is 8K, by 85.6%"),
        ("ruler", [ruler(4096, 0.9), ruler(8192, 0.85)], "fair", "effective context is 4K"),
        ("ruler", [ruler(4096, 0.9), ruler(8192, 0.9, whole=False)], "fair", "effective context is 4K"),
        ("ruler", [ruler(4096, 0.5)], "fair", "is not reached at any context"),
        ("ruler", [ruler(4096, 0.1)], "bad", "though over 2 of the 13 tasks"),
        ("perplexity", bins(6, 6, 5, 5, 5, 4, 3.9), "good", "3.90 nats from 64 to 127: 1.20 less than up to 31"),
        ("perplexity", bins(6, 6, 5, 5, 5, 4, 4), "fair", "as much as at the best in between, 32 to 63"),
        ("perplexity", bins(6, 6, 5, 5, 5, 4, 4.2), "bad", "0.20 more than at the best"),
        ("perplexity", bins(9, 9, 9, 9, 9, 9, 8.98), "bad", "0.02 less than up to 31"),
        ("choice", [choices(0.7)], "good", "70.0% of 100 questions are right (70.0% by the mean over tokens), a guess"),
        ("choice", [choices(0.4)], "fair", "a guess gets 25.0%"),
        ("choice", [choices(0.33)], "bad", "within two standard errors of, or below, the 25.0% of a guess"),
        (
            "choice",
            [choices(0.9), choices(None, asked=0)],
            "bad",
            "none of its 101 questions could be asked (it",
        ),
        ("qa", [answers(0.7)], "good", "70.0% of 50 answers match"),
        ("qa", [answers(0.7), answers(0.3)], "fair", "30.0%"),
        ("qa", [answers(None)], "bad", "msvd: none of its 50 questions could be asked."),
        ("video-needle", [film(1.0, 0.9, 0.9)], "good", "told from others in 93% of 60 cases; a guess gets 25%."),
        ("video-needle", [film(0.5, 0.6, 0.9)], "fair", "67%"),
        ("video-needle", [film(0.5, 0.6, 0.9, rounds=2)], "bad", "with 2 needles is not told from a guess"),
    ],
)
def test_a_verdict_is_no_kinder_than_its_numbers(task: str, rows: list[dict[str, Any]], grade: str, words: str) -> None:
    found, text = said(task, rows)
    assert words in text
    assert found == grade
    assert text.endswith(".")
    assert text.count("  ") == 0


def test_plots_have_a_title_and_their_figures() -> None:
    curve = loss_by_position(bins(6, 6, 5, 5, 5, 4, 3.9))
    assert curve.startswith("<svg")
    assert "position in the window, tokens" in curve
    recognised = film_map([film(1.0, 0.5, 0.0), {**film(0.5, 0.5, 0.5), "frames": 128}])
    assert "gain of the needle, nats a code" in recognised
    asked = {**film(1.0, 0.0), "by": "questions", "needle_gain": [None, None]}
    assert "gain of the needle" not in film_map([asked])


def test_every_task_of_these_has_a_verdict() -> None:
    for task in ("multi-needle", "ruler", "perplexity", "choice", "qa", "video-needle"):
        assert TASKS[task].verdict([]) is None
