"""Plans: every token held once, every needed key at hand, every pair computed once, nothing sent in vain."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.plan.layouts import Assignment
from model.attention.plan.options import Route
from model.attention.plan.planner import LAYOUTS
from model.attention.plan.runs import Run, cut_runs
from model.attention.plan.segments import stage_of_distance, traffic
from model.attention.plan.sequence_plan import SequencePlan
from testing.dense_attention import allowed_pairs
from testing.reorder import dispatch, in_order


@st.composite
def documents(draw: st.DrawFn, multiple: int) -> np.ndarray:
    """cu_seqlens of a sequence whose length is a multiple of `multiple`: from one document to all of length 1."""
    n_tokens = multiple * draw(st.integers(1, max(1, 96 // multiple)))
    cuts = draw(st.sets(st.integers(1, max(1, n_tokens - 1)), max_size=n_tokens))
    return np.array([0, *sorted(cut for cut in cuts if cut < n_tokens), n_tokens])


@st.composite
def laid_out(draw: st.DrawFn, routes: tuple[Route, ...] = ("direct", "relay")) -> SequencePlan:
    """A plan by any of the layouts on 1 to 8 ranks of a ring, each of 1 to 3 ranks."""
    ring, degree, layout = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.sampled_from(list(LAYOUTS)))
    cu_seqlens = draw(documents(ring * degree))
    return SequencePlan(
        cu_seqlens, LAYOUTS[layout](cu_seqlens, ring), ring, degree, draw(st.sampled_from(routes)), layout
    )


@st.composite
def scattered(draw: st.DrawFn, routes: tuple[Route, ...] = ("direct", "relay")) -> SequencePlan:
    """A plan in which each token lies on any rank: no layout is harder."""
    ring = draw(st.integers(1, 5))
    cu_seqlens = draw(documents(ring))
    owners = np.array(draw(st.permutations(np.repeat(np.arange(ring), cu_seqlens[-1] // ring).tolist())))
    return SequencePlan(
        cu_seqlens, Assignment(np.arange(cu_seqlens[-1]), owners), ring, route=draw(st.sampled_from(routes))
    )


plans = st.one_of(laid_out(), scattered())
direct_plans = st.one_of(laid_out(("direct",)), scattered(("direct",)))


def blocks_of(plan: SequencePlan, rank: int) -> list[tuple[np.ndarray, tuple]]:
    """For the rank's own keys and each stage: the tokens whose keys are at hand, and the runs over them."""
    part = plan.rank(rank)
    held = [plan.ring_indices(ring_rank) for ring_rank in range(plan.ring)]
    blocks = [(held[rank // plan.ulysses], part.local)]
    for hop, stage in enumerate(part.stages, 1):
        back = hop if plan.route == "relay" else 0  # relayed keys lie in the storage of the rank `hop` places back
        owners = [(rank // plan.ulysses - back) % plan.ring if back else m.peer // plan.ulysses for m in stage.receives]
        keys = [held[o][a:b] for o, m in zip(owners, stage.receives) for a, b in m.ranges]
        blocks.append((np.concatenate(keys) if keys else np.empty(0, int), stage.runs))
    return blocks


@settings(deadline=None)
@given(plans)
def test_every_token_is_held_once_and_every_rank_holds_equally_many(plan: SequencePlan) -> None:
    held = [plan.indices(rank) for rank in range(plan.sp)]
    assert {len(indices) for indices in held} == {plan.n_tokens // plan.sp}
    assert all((np.diff(indices) > 0).all() for indices in held)
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(plan.n_tokens))


@settings(deadline=None)
@given(plans)
def test_the_ranks_of_one_ulysses_group_hold_the_ring_ranks_tokens_in_order(plan: SequencePlan) -> None:
    for ring_rank in range(plan.ring):
        parts = [plan.indices(ring_rank * plan.ulysses + part) for part in range(plan.ulysses)]
        np.testing.assert_array_equal(np.concatenate(parts), plan.ring_indices(ring_rank))


@settings(max_examples=200, deadline=None)
@given(plans)
def test_runs_cover_each_allowed_pair_once_and_no_other(plan: SequencePlan) -> None:
    counts = np.zeros((plan.n_tokens, plan.n_tokens), dtype=int)
    for ring_rank in range(plan.ring):
        rank = ring_rank * plan.ulysses
        queries = plan.ring_indices(ring_rank)
        for keys, runs in blocks_of(plan, rank):
            for run in runs:
                assert run.q_start < run.q_end
                assert run.k_start < run.k_end
                block = np.ones((run.q_end - run.q_start, run.k_end - run.k_start), dtype=int)
                if run.causal:
                    assert block.shape[0] == block.shape[1]
                    block = np.tril(block)
                assert run.n_pairs == block.sum()
                counts[np.ix_(queries[run.q_start : run.q_end], keys[run.k_start : run.k_end])] += block
    np.testing.assert_array_equal(counts, allowed_pairs(plan.cu_seqlens))
    work = [plan.rank(ring_rank * plan.ulysses).n_pairs for ring_rank in range(plan.ring)]
    assert sum(work) == allowed_pairs(plan.cu_seqlens).sum()
    np.testing.assert_array_equal(work, traffic(plan.segments, plan.ring).work)


@settings(deadline=None)
@given(direct_plans)
def test_a_rank_receives_exactly_the_keys_its_queries_may_see_elsewhere(plan: SequencePlan) -> None:
    allowed = allowed_pairs(plan.cu_seqlens)
    keys = traffic(plan.segments, plan.ring).keys
    for ring_rank in range(plan.ring):
        mine = plan.ring_indices(ring_rank)
        needed = set(np.flatnonzero(allowed[mine].any(axis=0))) - set(mine)
        received = [int(token) for block, _ in blocks_of(plan, ring_rank * plan.ulysses)[1:] for token in block]
        assert sorted(received) == sorted(needed)
        assert keys[ring_rank].sum() == len(needed)


@settings(deadline=None)
@given(plans)
def test_what_one_rank_receives_in_a_stage_is_what_the_other_sends_in_it_and_never_itself(plan: SequencePlan) -> None:
    stages = [plan.rank(rank).stages for rank in range(plan.sp)]
    assert len({len(of_rank) for of_rank in stages}) == 1
    for number in range(len(stages[0])):
        received = {(rank, m.peer): m.ranges for rank in range(plan.sp) for m in stages[rank][number].receives}
        sent = {(m.peer, rank): m.ranges for rank in range(plan.sp) for m in stages[rank][number].sends}
        assert received == sent
        assert all(a != b and a % plan.ulysses == b % plan.ulysses for a, b in received)
        for ranges in received.values():
            assert all(end < start for (_, end), (start, _) in pairwise(ranges)), "ranges that touch are one"


@settings(deadline=None)
@given(laid_out(("relay",)))
def test_a_relay_talks_to_neighbours_only_and_passes_on_what_came(plan: SequencePlan) -> None:
    for rank in range(plan.sp):
        before = None
        for stage in plan.rank(rank).stages:
            assert {m.peer for m in stage.sends} == {(rank + plan.ulysses) % plan.sp}
            assert {m.peer for m in stage.receives} == {(rank - plan.ulysses) % plan.sp}
            if before is not None:
                assert stage.sends[0].ranges == before
            before = stage.receives[0].ranges


@settings(deadline=None)
@given(direct_plans)
def test_stages_follow_the_distance_and_even_out_what_travels(plan: SequencePlan) -> None:
    keys = traffic(plan.segments, plan.ring).keys
    stages, n_stages = stage_of_distance(keys, plan.n_tokens // plan.ring)
    assert (np.diff(stages) >= 0).all()
    travelling = np.array([sum(keys[r, (r - d) % plan.ring] for r in range(plan.ring)) for d in range(plan.ring)])
    assert n_stages <= (travelling > 0).sum()
    for number in range(n_stages):  # a stage holds its even share, give or take the distances at its ends
        assert travelling[stages == number].sum() <= travelling.sum() / n_stages + travelling.max()


@settings(deadline=None)
@given(plans)
def test_positions_restart_at_zero_in_each_document(plan: SequencePlan) -> None:
    expected = np.concatenate([np.arange(n) for n in np.diff(plan.cu_seqlens)])
    np.testing.assert_array_equal(plan.positions, expected)


@settings(deadline=None)
@given(plans)
def test_what_is_dispatched_comes_back_in_order(plan: SequencePlan) -> None:
    array = np.arange(plan.n_tokens * 3).reshape(plan.n_tokens, 3)
    np.testing.assert_array_equal(in_order([dispatch(array, plan, rank) for rank in range(plan.sp)], plan), array)
    tensor = torch.from_numpy(array)
    assert torch.equal(in_order([dispatch(tensor, plan, rank) for rank in range(plan.sp)], plan), tensor)


@settings(deadline=None)
@given(plans)
def test_a_pickled_plan_is_the_same_plan(plan: SequencePlan) -> None:
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.rank(rank) for rank in range(plan.sp)] == [plan.rank(rank) for rank in range(plan.sp)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 200))
def test_runs_cut_in_two_lots_are_the_same_pairs(lengths: list[int], pairs: int) -> None:
    bounds = np.cumsum([0, *lengths]).tolist()
    runs = tuple(Run(a, b, a, b, True) for a, b in pairwise(bounds))
    counts = np.zeros((bounds[-1], bounds[-1]), dtype=int)
    first, last = cut_runs(runs, pairs)
    for run in (*first, *last):
        block = np.ones((run.q_end - run.q_start, run.k_end - run.k_start), dtype=int)
        counts[run.q_start : run.q_end, run.k_start : run.k_end] += np.tril(block) if run.causal else block
    np.testing.assert_array_equal(counts, allowed_pairs(np.array(bounds)))
    total = sum(n * (n + 1) // 2 for n in lengths)
    assert min(pairs, total) - max(lengths) <= sum(run.n_pairs for run in first) <= pairs


def test_runs_over_neighbouring_keys_of_the_same_queries_are_one_kernel_call() -> None:
    # Ranks 0 to 2 hold the first three quarters: rank 3 reads them as one rectangle if they come in one stage.
    plan = SequencePlan(np.array([0, 400]), LAYOUTS["contiguous"](np.array([0, 400]), 4), 4)
    runs = [run for stage in plan.rank(3).stages for run in stage.runs]
    assert all(run.q_end - run.q_start == 100 for run in runs)
    assert sum(run.k_end - run.k_start for run in runs) == 300
    assert all(len(stage.runs) <= 1 for stage in plan.rank(3).stages)


@pytest.mark.parametrize(
    ("start", "owner", "message"),
    [
        ([0, 4, 4], [0, 1, 0], "ascend"),
        ([1, 4], [0, 1], "ascend"),
        ([0, 9], [0, 1], "ascend"),
        ([0, 3], [0, 1], "equally many"),
        ([0, 4], [0, 0], "equally many"),
        ([0, 4], [0, 2], "none of the 2 ranks"),
    ],
)
def test_pieces_that_are_no_assignment_are_refused(start: list, owner: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequencePlan(np.array([0, 8]), Assignment(np.array(start), np.array(owner)), 2)


@pytest.mark.parametrize("cu_seqlens", [[0], [4, 8], [0, 4, 4, 8]])
def test_boundaries_that_do_not_ascend_from_zero_are_refused(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="does not ascend"):
        SequencePlan(np.array(cu_seqlens), Assignment(np.array([0]), np.array([0])), 1)
