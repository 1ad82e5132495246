"""The part "ring" fails where the merge, a block, a route, a gradient's way home or the bounds are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.right import ring as part
from model.attention import block_exchange, flash_kernels, ring, ulysses
from model.attention.flash_kernels import CallBounds
from model.attention.plan import sequence_plan
from model.attention.plan.runs import RankPlan, Runs, Stage
from tests.benchmarks.gpu.rehearsal import rehearse

pytestmark = pytest.mark.slow


@pytest.fixture
def fewer_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of four ranks alone: what a mutation breaks it breaks in all."""
    monkeypatch.setattr(part, "RANKS", (4,))


def test_it_passes_on_every_plan() -> None:
    rehearsal = rehearse("ring")
    assert rehearsal.passed, rehearsal.last
    plans = [row["what"] for row in rehearsal.rows if "Ulysses" in row["what"]]
    assert len(plans) == len(set(plans)) == 29
    for words in (
        "8 ranks, Ulysses 8, ",
        "8 ranks, Ulysses 1, shared-0.5%, relay",
        "2 ranks, Ulysses 1, zigzag, direct",
    ):
        assert any(words in what for what in plans)


def test_plans_for_which_no_time_is_left_are_said() -> None:
    rehearsal = rehearse("ring", seconds=part.REST_SECONDS)
    assert rehearsal.passed
    (skipped,) = (row for row in rehearsal.rows if row["kind"] == "skipped")
    assert skipped["why"] == "27 of 27 were not run"


@pytest.mark.usefixtures("fewer_plans")
def test_a_merge_in_bf16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    merge_ = flash_kernels.merge_

    def rounded(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        merge_(out, lse, block_out, block_lse)
        out.copy_(out.bfloat16())

    monkeypatch.setattr(flash_kernels, "merge_", rounded)
    broken = rehearse("ring").broken
    assert "merge of eight blocks: out" in broken
    assert "one document, 8 ranks, Ulysses 1, zigzag, relay: error over one kernel's" in broken


@pytest.mark.usefixtures("fewer_plans")
def test_gradients_summed_in_bf16_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = ring.attend_backward_

    def rounded(dq: Tensor, *arguments: Any) -> None:
        backward(dq, *arguments)
        dq.copy_(dq.bfloat16())

    monkeypatch.setattr(ring, "attend_backward_", rounded)
    assert not rehearse("ring").passed


@pytest.mark.usefixtures("fewer_plans")
def test_a_log_sum_exp_of_the_wrong_sign_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = flash_kernels._forward_cpu

    def negated(*arguments: Any) -> Iterator[Any]:
        for a, b, out, lse in forward(*arguments):
            yield a, b, out, -lse

    monkeypatch.setattr(flash_kernels, "_forward_cpu", negated)
    assert not rehearse("ring").passed


def without_last_stage(derive: Callable[..., Any]) -> Callable[..., Any]:
    """A rank that receives its last block and computes nothing on it."""

    def derived(*arguments: Any) -> tuple[Runs, tuple[Stage, ...]]:
        local, stages = derive(*arguments)
        return local, (*stages[:-1], Stage(stages[-1].receives, stages[-1].sends, Runs())) if stages else ()

    return derived


@pytest.mark.usefixtures("fewer_plans")
@pytest.mark.parametrize("route", ["direct", "relay"])
def test_a_rank_whose_block_is_dropped_fails(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{route}_stages"
    monkeypatch.setattr(sequence_plan, name, without_last_stage(getattr(sequence_plan, name)))
    broken = rehearse("ring").broken
    assert f"one document, 8 ranks, Ulysses 1, zigzag, {route}: error over one kernel's" in broken
    assert not any(route not in what for what in broken if "Ulysses" in what)


@pytest.mark.usefixtures("fewer_plans")
def test_a_route_that_leaves_out_the_last_key_of_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    derive = sequence_plan.relay_stages

    def derived(*arguments: Any) -> tuple[Runs, tuple[Stage, ...]]:
        local, stages = derive(*arguments)
        short = [Runs(run._replace(k_end=max(run.k_end - 1, run.k_start + 1)) for run in s.runs) for s in stages]
        return local, tuple(Stage(s.receives, s.sends, runs) for s, runs in zip(stages, short))

    monkeypatch.setattr(sequence_plan, "relay_stages", derived)
    assert "one document, 8 ranks, Ulysses 1, zigzag, relay: error over one kernel's" in rehearse("ring").broken


@pytest.mark.usefixtures("fewer_plans")
def test_gradients_that_never_reach_their_owners_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_exchange, "add_rows_", lambda *_: None)
    assert not rehearse("ring").passed


@pytest.mark.usefixtures("fewer_plans")
def test_heads_that_come_back_in_another_order_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = ulysses._gather_heads
    monkeypatch.setattr(ulysses, "_gather_heads", lambda x, exchange, degree: gather(x, exchange, degree).flip(1))
    broken = rehearse("ring").broken
    assert any("Ulysses 2" in what for what in broken)
    assert not any("Ulysses 1," in what for what in broken)


@pytest.mark.usefixtures("fewer_plans")
def test_bounds_cut_at_the_wrong_place_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    make = CallBounds.__init__

    def shifted(self: CallBounds, plan: RankPlan) -> None:
        make(self, plan)
        self._joined = self._joined.roll(1)

    monkeypatch.setattr(CallBounds, "__init__", shifted)
    assert rehearse("ring").broken == {
        f"bounds on the device, {route}: calls whose bounds are not the plan's" for route in ("direct", "relay")
    }


@pytest.mark.usefixtures("fewer_plans")
def test_bounds_that_no_kernel_finds_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    bring = CallBounds.to
    monkeypatch.setattr(CallBounds, "to", lambda self, device: bring(self, torch.device("meta")))
    assert not rehearse("ring").passed
