"""The script's runner: a part that fails, dies or hangs costs itself, and no skip passes that was not declared."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.part import Bench, Part
from benchmarks.gpu.report import failed, gpu_report
from storage.errors import UserError


def sound(bench: Bench) -> None:
    bench.check("error", 1e-9, at_most=1e-6)
    bench.goal("speed", 3.0, at_least=2.0, explain=lambda: {"profile": "not asked for"})


def wrong(bench: Bench) -> None:
    bench.check("error", float("nan"), at_most=1e-6)
    bench.check("another", 1.0, at_least=2.0)


def slow(bench: Bench) -> None:
    bench.goal("speed", 1.0, at_least=2.0, explain=lambda: {"profile": ["top"], "floor_seconds": 0.1})


def raises(bench: Bench) -> None:
    raise RuntimeError("an illegal memory access")


def dies(bench: Bench) -> None:
    os._exit(9)


def hangs(bench: Bench) -> None:
    bench.figures("before", x=1)
    time.sleep(600)


def skips(bench: Bench) -> None:
    bench.skip("declared", "there is none")
    bench.skip("not declared", "somebody forgot it")


def part(name: str, **settings: Any) -> Part:
    return Part(name, "right", f"is {name}", f"{__name__}:{name}", **{"seconds": 30.0, **settings})


def report_of(*parts: Part, path: Path | None = None, minutes: float = 2.0) -> dict[str, Any]:
    return gpu_report(parts, "cpu", True, minutes, path)


@pytest.mark.faults
@pytest.mark.slow
def test_a_part_that_fails_or_dies_costs_itself_alone(tmp_path: Path) -> None:
    report = report_of(
        part("sound"), part("wrong"), part("raises"), part("dies"), part("slow"), path=tmp_path / "r.json"
    )
    states = {name: entry["state"] for name, entry in report["parts"].items()}
    assert states == {"sound": "passed", "wrong": "failed", "raises": "failed", "dies": "failed", "slow": "passed"}
    assert report["parts"]["wrong"]["why"] == "error: nan, at most 1e-06; another: 1, at least 2"
    assert "illegal memory access" in report["parts"]["raises"]["why"]
    assert "died" in report["parts"]["dies"]["why"]
    assert failed(report) == ["wrong", "raises", "dies"]
    (goal,) = report["parts"]["slow"]["rows"]
    assert (goal["met"], goal["profile"], goal["floor_seconds"]) == (False, ["top"], 0.1)
    assert "profile" not in report["parts"]["sound"]["rows"][1]
    assert json.loads((tmp_path / "r.json").read_text()) == report


@pytest.mark.faults
@pytest.mark.slow
def test_a_part_that_hangs_is_ended_and_what_it_measured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.run.GRACE", 1.0)
    report = report_of(part("hangs", seconds=3.0), part("sound"))
    assert [entry["state"] for entry in report["parts"].values()] == ["out of time", "passed"]
    assert report["parts"]["hangs"]["rows"] == [{"kind": "figures", "what": "before", "x": 1}]


@pytest.mark.slow
def test_a_skip_that_was_not_declared_is_a_failure() -> None:
    report = report_of(part("skips", skips=frozenset({"declared"})))
    assert failed(report) == ["skips"]
    assert "'not declared'" in report["parts"]["skips"]["why"]
    assert [row["what"] for row in report["parts"]["skips"]["rows"]] == ["declared"]


def test_what_a_machine_lacks_is_skipped_by_name() -> None:
    report = report_of(part("sound", packages=("no_such_package",)), part("slow", cards=3))
    assert [entry["state"] for entry in report["parts"].values()] == ["skipped", "skipped"]
    assert report["parts"]["sound"]["why"] == "not installed: no_such_package"
    assert report["parts"]["slow"]["why"] == "needs 3 cards, here are 2"
    assert failed(report) == []


def test_no_part_is_begun_without_time() -> None:
    report = report_of(part("sound"), minutes=0.1)
    assert report["parts"]["sound"]["state"] == "out of time"


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no CUDA device here"):
        gpu_report((part("sound"),), "cuda", False, 1.0, None)
