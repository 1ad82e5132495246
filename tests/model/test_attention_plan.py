"""The planner: every token held once, every needed key at hand, every pair computed once, nothing sent in vain."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from attention_groups import allowed_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.plan import SequencePlan, dispatch, gather, plan_sequence


@st.composite
def documents(draw: st.DrawFn, multiple: int) -> np.ndarray:
    """cu_seqlens of a sequence whose length is a multiple of `multiple`: from one document to all of length 1."""
    n_tokens = multiple * draw(st.integers(1, 96 // multiple))
    cuts = draw(st.sets(st.integers(1, max(1, n_tokens - 1)), max_size=n_tokens))
    return np.array([0, *sorted(cut for cut in cuts if cut < n_tokens), n_tokens])


@st.composite
def laid_out(draw: st.DrawFn) -> SequencePlan:
    """A plan by one of the layouts on 1 to 8 ranks."""
    sp, layout = draw(st.integers(1, 8)), draw(st.sampled_from(["contiguous", "zigzag"]))
    return plan_sequence(draw(documents(2 * sp)), sp, layout)


@st.composite
def scattered(draw: st.DrawFn) -> SequencePlan:
    """A plan in which each token lies on any rank: no layout is harder."""
    sp = draw(st.integers(1, 5))
    cu_seqlens = draw(documents(sp))
    owners = np.array(draw(st.permutations(np.repeat(np.arange(sp), cu_seqlens[-1] // sp).tolist())))
    pieces = [np.stack([held, held + 1], axis=1) for held in (np.flatnonzero(owners == rank) for rank in range(sp))]
    return SequencePlan(cu_seqlens, tuple(pieces))


plans = st.one_of(laid_out(), scattered())


@settings(deadline=None)
@given(plans)
def test_every_token_is_held_once_and_every_rank_holds_equally_many(plan: SequencePlan) -> None:
    held = [plan.indices(rank) for rank in range(plan.sp)]
    assert {len(indices) for indices in held} == {plan.n_tokens // plan.sp}
    assert all((np.diff(indices) > 0).all() for indices in held)
    np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(plan.n_tokens))


@settings(max_examples=200, deadline=None)
@given(plans)
def test_runs_cover_each_allowed_pair_once_and_no_other(plan: SequencePlan) -> None:
    counts = np.zeros((plan.n_tokens, plan.n_tokens), dtype=int)
    for rank in range(plan.sp):
        queries, part = plan.indices(rank), plan.rank(rank)
        sources = [(queries, part.local)]
        for fetch in part.fetches:
            storage = plan.indices(fetch.peer)
            sources.append((np.concatenate([storage[a:b] for a, b in fetch.ranges]), fetch.runs))
        for keys, runs in sources:
            for run in runs:
                assert run.q_start < run.q_end
                assert run.k_start < run.k_end
                block = np.ones((run.q_end - run.q_start, run.k_end - run.k_start), dtype=int)
                if run.causal:
                    assert block.shape[0] == block.shape[1]
                    block = np.tril(block)
                counts[np.ix_(queries[run.q_start : run.q_end], keys[run.k_start : run.k_end])] += block
    np.testing.assert_array_equal(counts, allowed_pairs(plan.cu_seqlens))
    assert sum(plan.rank(rank).n_pairs for rank in range(plan.sp)) == allowed_pairs(plan.cu_seqlens).sum()


@settings(deadline=None)
@given(plans)
def test_a_rank_fetches_exactly_the_keys_its_queries_may_see_elsewhere(plan: SequencePlan) -> None:
    allowed = allowed_pairs(plan.cu_seqlens)
    for rank in range(plan.sp):
        needed = set(np.flatnonzero(allowed[plan.indices(rank)].any(axis=0))) - set(plan.indices(rank))
        fetched = [
            int(token)
            for fetch in plan.rank(rank).fetches
            for a, b in fetch.ranges
            for token in plan.indices(fetch.peer)[a:b]
        ]
        assert sorted(fetched) == sorted(needed)


@settings(deadline=None)
@given(plans)
def test_what_one_rank_fetches_is_what_the_other_serves_and_never_itself(plan: SequencePlan) -> None:
    asked = {(rank, f.peer): f.ranges for rank in range(plan.sp) for f in plan.rank(rank).fetches}
    served = {(s.peer, rank): s.ranges for rank in range(plan.sp) for s in plan.rank(rank).serves}
    assert asked == served
    assert all(a != b for a, b in asked)
    for ranges in asked.values():
        assert all(end < start for (_, end), (start, _) in pairwise(ranges)), "ranges that touch are one"


@settings(deadline=None)
@given(plans)
def test_a_query_meets_a_source_in_at_most_one_run(plan: SequencePlan) -> None:
    for rank in range(plan.sp):
        part = plan.rank(rank)
        for runs in (part.local, *(fetch.runs for fetch in part.fetches)):
            assert all(one.q_end <= other.q_start for one, other in pairwise(runs))


@settings(deadline=None)
@given(plans)
def test_positions_restart_at_zero_in_each_document(plan: SequencePlan) -> None:
    expected = np.concatenate([np.arange(n) for n in np.diff(plan.cu_seqlens)])
    np.testing.assert_array_equal(plan.positions, expected)


@settings(deadline=None)
@given(plans)
def test_gather_undoes_dispatch(plan: SequencePlan) -> None:
    array = np.arange(plan.n_tokens * 3).reshape(plan.n_tokens, 3)
    parts = [dispatch(array, plan, rank) for rank in range(plan.sp)]
    np.testing.assert_array_equal(gather(parts, plan), array)


@settings(deadline=None)
@given(plans)
def test_a_pickled_plan_is_the_same_plan(plan: SequencePlan) -> None:
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.rank(rank) for rank in range(plan.sp)] == [plan.rank(rank) for rank in range(plan.sp)]


def test_documents_that_end_on_rank_edges_need_no_communication() -> None:
    plan = plan_sequence(np.array([0, 8, 12, 16, 24, 32]), 4, "contiguous")
    assert all(not plan.rank(rank).fetches and not plan.rank(rank).serves for rank in range(4))


def test_zigzag_evens_the_work_of_one_document() -> None:
    plan = plan_sequence(np.array([0, 4096]), 8, "zigzag")
    work = [plan.rank(rank).n_pairs for rank in range(8)]
    assert max(work) == min(work)
    uneven = plan_sequence(np.array([0, 4096]), 8, "contiguous")
    assert uneven.rank(7).n_pairs > 10 * uneven.rank(0).n_pairs


@pytest.mark.parametrize(
    ("cu_seqlens", "sp", "layout", "message"),
    [
        ([0, 10], 4, "contiguous", "contiguous layout on 4 ranks"),
        ([0, 12], 4, "zigzag", "zigzag layout on 4 ranks"),
        ([0, 8], 2, "striped", "'striped' is none of"),
        ([0, 4, 4, 8], 2, "zigzag", "does not ascend"),
        ([4, 8], 1, "zigzag", "does not ascend"),
        ([0], 1, "zigzag", "no document"),
        ([0, 8], 0, "zigzag", "0 ranks"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(cu_seqlens: list[int], sp: int, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sequence(np.array(cu_seqlens), sp, layout)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([[[0, 4]], [[3, 8]]], "exactly once"),
        ([[[0, 3]], [[4, 8]]], "exactly once"),
        ([[[0, 3]], [[3, 8]]], "equally many"),
        ([[[6, 8], [0, 2]], [[2, 6]]], "ascending"),
    ],
)
def test_pieces_that_are_no_assignment_are_refused(pieces: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequencePlan(np.array([0, 8]), tuple(np.array(piece) for piece in pieces))
