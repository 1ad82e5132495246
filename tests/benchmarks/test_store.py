"""The storage benchmark, on an object of a few megabytes: both systems read and write it whole."""

from __future__ import annotations

import pytest

from benchmarks.store import SYSTEMS, TASKS, print_store, store_report

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def test_a_report_has_a_row_for_each_system_and_task_and_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    report = store_report(megabytes=2, rounds=1)
    assert [(row["task"], row["system"]) for row in report["rows"]] == [(t, s) for t in TASKS for s in SYSTEMS]
    assert all(row["mb_per_cpu_s"] > 0 and row["mb_per_s"] > 0 for row in report["rows"])
    (claim,) = report["claims"]
    assert claim["met"] == (claim["measured"] >= claim["target"])
    print_store(report)
    assert "read    ringworld" in capsys.readouterr().out
