"""The benchmark of planning measures real plans, and its claims follow from its rows."""

from __future__ import annotations

import json

import pytest

from benchmarks.corpus.planning import claims, planning_report, print_planning


@pytest.mark.faults
def test_plans_and_listings_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(json.dumps(planning_report((200,), local_files=20)))
    states = [(row["state"], row["objects"]) for row in report["rows"]]
    plans = [(state, 200) for state in ("cold", "unchanged", "grown")]
    assert states == [*plans, ("delayed", 200), ("local, hashed", 20), ("local, unchanged", 20)]
    assert all(row["rss_gib"] > 0.05 for row in report["rows"] if "plan_s" in row)
    assert len(report["claims"]) == 4
    print_planning(report)
    assert "unchanged: CPU seconds at most 30" in capsys.readouterr().out


def test_a_claim_is_missed_where_the_time_grows_faster_than_the_objects() -> None:
    rows = [
        {"state": state, "objects": size, "plan_s": size**1.5, "cpu_s": size / 1e5, "rss_gib": 3.0}
        for size in (10**5, 10**6)
        for state in ("cold", "unchanged")
    ]
    rows.append({"state": "delayed", "objects": 10**6, "wall_s": 5, "serial_wait_s": 25, "share_of_serial": 0.2})
    found = {claim["claim"]: (claim["measured"], claim["met"]) for claim in claims(rows)}
    assert found["plan of a million objects, cold: CPU seconds at most"] == (10.0, True)
    assert found["plan of a million objects: GiB of memory at most"] == (3.0, False)
    assert found["time of a plan, cold, over objects: exponent at most"] == (1.5, False)
