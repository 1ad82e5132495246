"""`ringworld bench plan`: the table, its claims, and what it says to a user's mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.peers import PEERS
from benchmarks.plan import claims, plan_report
from jobs.cli import main
from jobs.guard import USER_MISTAKE
from model.attention.plan.hardware import AttentionShape, Hardware


def test_a_report_has_a_cell_for_each_combination_and_a_row_for_each_system(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    grid = ["--contexts", "4096", "8192", "--ranks", "4", "--mixes", "lwm", "one", "--sequences", "2"]
    assert main(["bench", "plan", *grid, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [(cell["mix"], cell["context"], cell["ranks"]) for cell in report["cells"]] == [
        ("lwm", 4096, 4),
        ("lwm", 8192, 4),
        ("one", 4096, 4),
        ("one", 8192, 4),
    ]
    for cell in report["cells"]:
        assert set(cell["systems"]) == {"tightest", "chosen", *PEERS}
        assert cell["planning_ms"] > 0
        for figures in cell["systems"].values():
            assert figures["work_over_mean"] >= 1
            assert 0 <= figures["keys"] <= figures["most_keys"]
            assert 0 < figures["efficiency"] <= 1
    assert report["settings"]["shape"]["kv_heads"] == 8
    assert report["machine"]["date"]


def test_the_choice_is_at_least_as_fast_as_the_tightest_and_as_layouts_it_could_have_chosen() -> None:
    report = plan_report([8192], [8], ["lwm"], 2, AttentionShape(heads=8, kv_heads=8), Hardware())
    systems = report["cells"][0]["systems"]
    for name in ("tightest", "contiguous", "zigzag"):
        assert systems["chosen"]["efficiency"] >= systems[name]["efficiency"]
    for name in ("contiguous", "zigzag"):
        assert systems["chosen"]["efficiency"] >= systems[name]["efficiency_at_best_ulysses"]


def cell(ours: float, theirs: float, keys: float) -> dict:
    row = {"work_over_mean": 1.01, "keys": keys, "efficiency": ours}
    peers = {name: {"work_over_mean": 1.0, "keys": 0.4, "efficiency": theirs} for name in PEERS}
    systems = {"tightest": row, "chosen": row, **peers}
    return {"mix": "lwm", "context": 2**20, "ranks": 512, "planning_ms": 40.0, "systems": systems}


def test_claims_are_computed_from_the_cells() -> None:
    found = {claim["claim"].partition(":")[0]: claim for claim in claims([cell(0.8, 0.5, 0.1)])}
    assert all(claim["met"] for claim in claims([cell(0.8, 0.5, 0.1)]))
    assert found["planning"]["measured"] == 40
    missed = [claim["claim"] for claim in claims([cell(0.7, 0.75, 0.5)]) if not claim["met"]]
    assert missed == [
        "tightest: keys received over min-heap's at most",
        "chosen: efficiency at least",
        "chosen: efficiency over any peer's, difference at least",
        "chosen: efficiency over any peer's below 0.95, difference above",
    ]


def test_a_peer_above_95_percent_may_be_a_little_ahead() -> None:
    assert all(claim["met"] for claim in claims([cell(0.96, 0.965, 0.1)]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--mixes", "books"], "there is no mix 'books', only images, clips, lwm, one"),
        (["plan", "--ranks", "7"], "7 ranks do not divide a context of 32768 tokens"),
        (["plan", "--sequences", "0"], "--sequences 0 is less than 1"),
        (["plan", "--kv-heads", "5"], "--kv-heads 5 does not divide --heads 32"),
        (["plan", "--contexts", "64", "--ranks", "2", "--sequences", "1", "--json", "/nowhere/x"], "cannot write"),
        (["attention", "--ranks", "7"], "7 ranks do not divide a context of 16384 tokens"),
        (["attention", "--mix", "books"], "there is no mix 'books', only images, clips, lwm, one"),
        (["attention", "--kv-heads", "3"], "3 kv heads do not divide 4 heads"),
        (["attention", "--rounds", "0"], "--rounds 0 is less than 1"),
        (["attention", "--ranks", "1024", "--slow-exchange", "1"], "--slow-exchange needs a core a rank"),
        (["attention", "--ranks", "1", "--slow-exchange", "-1"], "--slow-exchange -1 is not a number of seconds"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == USER_MISTAKE
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
