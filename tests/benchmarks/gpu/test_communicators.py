"""The part `communicators` rehearsed by two gloo processes: it passes, and fails where what it guards is broken."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.gpu.many import communicators
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.parts import chosen
from benchmarks.gpu.run import run_here
from model.attention import block_exchange

pytestmark = pytest.mark.slow

RIGHT = communicators.rank_findings


def rehearse(seconds: float = 240) -> tuple[dict[str, Any], list[Row]]:
    rows: list[Row] = []
    (part,) = chosen(["communicators"])
    return run_here(Bench(part, torch.device("cpu"), True, time.monotonic() + seconds, rows.append)), rows


def why_it_fails(monkeypatch: pytest.MonkeyPatch, findings: Callable[..., None], seconds: float = 240) -> str:
    """With each process running `findings`, which breaks something there."""
    monkeypatch.setattr(communicators, "rank_findings", findings)
    outcome, _ = rehearse(seconds)
    assert outcome["kind"] == "failed"
    return outcome["why"]


@pytest.mark.faults
def test_the_rehearsal_passes_on_two_groups_that_take_turns() -> None:
    outcome, rows = rehearse()
    assert outcome == {"kind": "passed"}, rows
    checks = {row["what"]: row["measured"] for row in rows if row["kind"] == "check"}
    assert len([what for what in checks if what.startswith(("fp32", "bf16"))]) == 4
    assert checks["groups whose operations are launched by turns"] == 2
    assert checks["processes that hang"] == 0
    assert rows[-1]["order"] == "1"


def test_one_card_is_not_enough_and_says_so() -> None:
    (part,) = chosen(["many"])
    assert part.missing(cards=1) == "needs 2 cards, here is 1"
    assert part.missing(cards=2) is None


def without_returned_gradients(*arguments: Any) -> None:
    block_exchange.add_rows_ = lambda *_: None
    RIGHT(*arguments)


@pytest.mark.faults
def test_gradients_of_keys_that_get_lost_on_their_way_home_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fp32, contiguous, 1, relay: gradient" in why_it_fails(monkeypatch, without_returned_gradients)


def in_another_order(rank: int, *arguments: Any) -> None:
    launched = communicators._launched

    def turned(*of_engine: Any) -> list[Any]:
        mine = launched(*of_engine)
        if rank:
            turn = next(n for n, (one, other) in enumerate(pairwise(mine)) if one.group != other.group)
            mine[turn : turn + 2] = mine[turn + 1], mine[turn]
        return mine

    communicators._launched = turned
    RIGHT(rank, *arguments)


@pytest.mark.faults
def test_ranks_that_launch_in_two_orders_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ranks that would wait for ever" in why_it_fails(monkeypatch, in_another_order)


def hanging(rank: int, *arguments: Any) -> None:
    if rank:
        time.sleep(600)


@pytest.mark.faults
def test_a_process_that_hangs_is_ended_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "processes that hang: 1" in why_it_fails(monkeypatch, hanging, seconds=8)


def dying(rank: int, *arguments: Any) -> None:
    monkeypatch = pytest.MonkeyPatch()
    if rank:
        monkeypatch.setattr(communicators, "_law", lambda *_: 1 / 0)
    RIGHT(rank, *arguments)


@pytest.mark.faults
def test_a_process_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "division by zero" in why_it_fails(monkeypatch, dying)
