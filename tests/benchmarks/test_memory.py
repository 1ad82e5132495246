"""`ringworld bench memory`: the peak of a step grows in a straight line with the tokens of a rank, as predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.allocations import peak_bytes
from benchmarks.memory import WITHIN, _line
from jobs.cli import main
from jobs.guard import USER_MISTAKE


@pytest.mark.faults
def test_the_peak_is_straight_in_the_tokens_of_a_rank_and_within_what_is_predicted(tmp_path: Path) -> None:
    reports = []
    while len(reports) < 6:  # on a busy machine buffers of several reductions live at once: the least is the step's own
        path = tmp_path / "memory.json"
        assert (
            main(["bench", "memory", "--contexts", "4096", "8192", "16384", "--ranks", "2", "--json", str(path)]) == 0
        )
        reports.append(json.loads(path.read_text())["rows"])
        rows = [{**several[0], "measured": min(row["measured"] for row in several)} for several in zip(*reports)]
        off = {row["name"]: row["predicted"] / row["measured"] - 1 for row in rows}
        r2 = _line(rows[:3])["r2"]
        if max(map(abs, off.values())) < WITHIN and r2 > 0.995:
            break
    assert len(rows) == 3 + 7
    assert max(map(abs, off.values())) < WITHIN, off
    assert r2 > 0.995
    assert [row["tokens"] for row in rows[:3]] == [2048, 4096, 8192]


def test_a_line_is_fitted_to_its_points() -> None:
    rows = [{"tokens": tokens, "measured": 7 * tokens + 100} for tokens in (10, 20, 40)]
    assert _line(rows) == {"bytes_per_token": 7.0, "constant": 100, "r2": 1.0}
    rows[1]["measured"] += 60
    assert _line(rows)["r2"] < 0.95


def test_the_peak_counts_what_was_made_before_but_not_its_own_peak() -> None:
    kept: list[torch.Tensor] = []

    def before() -> None:
        torch.zeros(40_000)
        kept.append(torch.zeros(1000))

    peak = peak_bytes(lambda: torch.zeros(2000), before)
    assert 4 * 3000 <= peak < 4 * 3000 + 1024


@pytest.mark.parametrize(
    "wrong", [["--contexts", "4096", "8192"], ["--contexts", "512", "1024", "2048"], ["--ranks", "0"]]
)
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", *wrong]) == USER_MISTAKE
    assert wrong[0] in capsys.readouterr().err
