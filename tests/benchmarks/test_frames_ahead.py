"""`ringworld bench frames`: what is counted is what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import frames_ahead
from benchmarks.frames_ahead import frames_table
from jobs.cli import main
from jobs.guard import USER_MISTAKE


@pytest.mark.slow
def test_the_report_says_how_many_codes_a_forward_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_ahead, "SIZE", {**frames_ahead.SIZE, "hidden_size": 32, "intermediate_size": 48})
    path = tmp_path / "frames.json"
    assert main(["bench", "frames", "--ahead", "16", "--frames", "2", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["frames"]
    assert [(row["codes_per_frame"], row["ahead"]) for row in rows] == [(64, 0), (64, 16), (256, 0), (256, 16)]
    for row in rows:
        if row["ahead"] == 0:  # each code and the marker between two frames enter alone
            assert row["codes_per_forward"] == pytest.approx(
                2 * row["codes_per_frame"] / (2 * row["codes_per_frame"] + 1), abs=1e-3
            )
        else:
            assert 1 < row["codes_per_forward"] <= 16


def test_gains_are_over_the_same_prompt_code_by_code() -> None:
    figures = [("a", 0, 2.0), ("a", 8, 3.0), ("b", 0, 4.0), ("b", 8, 1.0)]
    rows = [
        {"name": n, "codes_per_frame": 64, "ahead": w, "codes_per_forward": 1.0, "frames_per_cpu_second": f}
        for n, w, f in figures
    ]
    assert list(frames_table(rows).columns[-1].cells) == ["1.00", "1.50", "1.00", "0.25"]


def test_windows_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "frames", "--ahead", "0"]) == USER_MISTAKE
    assert "--ahead 0 is less than 1" in capsys.readouterr().err
