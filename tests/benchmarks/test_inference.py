"""`ringworld bench inference`: ours and transformers decode the same tokens, and the report says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.inference import Settings, _claims
from jobs.cli import main
from jobs.guard import USER_MISTAKE


@pytest.mark.slow
def test_the_report_is_written(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    small = ["--contexts", "48", "--prefill", "128", "--tokens", "6", "--rounds", "1"]
    assert main(["bench", "inference", *small, "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"date", "processor", "cores", "transformers"} <= set(report["machine"])
    assert set(report["prefill"]) == {"ours", "transformers", "ours, 2 processes"}
    assert set(report["decoding"]["48"]) == {"ours", "transformers", "transformers, static cache"}
    assert report["decoding"]["48"]["ours"]["cpu_ms_per_token"] > 0


@pytest.mark.slow
def test_parts_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    arguments = ["--only", "prefill", "--prefill", "64", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "inference", *arguments]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert (report["decoding"], set(report["prefill"])) == ({}, {"ours", "transformers"})


def test_ratios_are_of_the_same_clock() -> None:
    row = {"ours": {"wall_ms_per_token": 2.0, "cpu_ms_per_token": 1.0}}
    row["transformers"] = {"wall_ms_per_token": 5.0, "cpu_ms_per_token": 4.0}
    prefill = {name: {"wall": wall, "cpu": cpu} for name, wall, cpu in (("ours", 8, 6), ("transformers", 8, 9))}
    prefill["ours, 2 processes"] = {"wall": 5, "cpu": 3}
    claims = _claims({"1024": row}, prefill, Settings())
    assert [claim["measured"] for claim in claims] == [2.5, 1.0, 1.6, 4.0, 1.5, 2.0]
    assert [claim["met"] for claim in claims] == [True, False, False, True, True, True]


def test_sizes_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", "--tokens", "0"]) == USER_MISTAKE
    assert "--tokens 0 is less than 1" in capsys.readouterr().err
    assert main(["bench", "inference", "--only", "training"]) == USER_MISTAKE
    assert "--only training is no part; choose of decoding, prefill, ranks" in capsys.readouterr().err
