"""The attention part: what a ring computes is what one block would; work that is skipped or counted twice fails it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu.fast import attention
from model.attention import ring
from model.attention.plan.runs import RankPlan, Runs
from model.attention.plan.sequence_plan import SequencePlan
from tests.benchmarks.gpu.rehearsal import rehearse


def test_a_ring_computes_what_one_block_would_and_missed_goals_are_explained() -> None:
    rehearsal = rehearse("attention")
    assert rehearsal.passed, rehearsal.last
    rows = rehearsal.rows
    missed = [row for row in rows if row["kind"] == "goal" and not row["met"]]
    assert len([row for row in rows if row["kind"] == "goal"]) == 6
    assert missed, "a rehearsal's goals are those of a card"
    for row in missed:
        assert 0 < len(row["profile"]) <= 10
        assert row["floor_seconds"] > 0
        assert row["floor_by"] in ("flops", "bytes")


def test_documents_are_as_long_as_the_peer_publishes() -> None:
    lengths = np.diff(attention._magi_documents(2**22, seed=0))
    assert lengths.sum() == 2**22
    for low, high, percent in attention.MAGI_LENGTHS:
        assert abs(100 * ((lengths >= low) & (lengths <= high)).mean() - percent) < 3
    assert np.diff(attention._magi_documents(2**14, seed=1)).max() <= 2**12, "none is over a quarter of the whole"


def test_a_merge_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "attend_", lambda *_: None)
    assert "difference to one block" in rehearse("attention").last["why"]


def test_a_stage_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SequencePlan.rank

    def without_its_last_runs(plan: SequencePlan, rank: int) -> RankPlan:
        mine = whole(plan, rank)
        if not mine.stages:
            return mine
        return replace(mine, stages=(*mine.stages[:-1], replace(mine.stages[-1], runs=Runs())))

    monkeypatch.setattr(SequencePlan, "rank", without_its_last_runs)
    why = rehearse("attention").last["why"]
    assert "pairs of all ranks over the documents'" in why
    assert "difference to one block" in why


def test_operations_counted_twice_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    once = attention.operations
    monkeypatch.setattr(attention, "operations", lambda *sizes: once(*sizes).times(2))
    assert "operations of a pair over torch's count: 2" in rehearse("attention").last["why"]


def test_a_rate_above_the_peak_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "seconds_of", lambda *_: 1e-9)
    assert "share of the matrix peak" in rehearse("attention").last["why"]
