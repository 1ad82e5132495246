"""The planner: balanced where it says so, sparing with keys, and never worse than what it could have chosen."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.plan.balanced_layout import shared_over_fewest
from model.attention.plan.cost_model import direct_cost, relay_cost
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.options import Layout
from model.attention.plan.planner import LAYOUTS, TIGHTEST, TOLERANCES, candidates, plan_sequence
from model.attention.plan.segments import Traffic, cut_at_documents, traffic
from testing.dense_attention import allowed_pairs

GQA = AttentionShape(heads=32, kv_heads=8)


def mixed(n_tokens: int, longest: int, seed: int) -> np.ndarray:
    """Boundaries of documents whose lengths are log-uniform up to `longest`."""
    rng, cuts = np.random.default_rng(seed), [0]
    while cuts[-1] < n_tokens:
        cuts.append(min(n_tokens, cuts[-1] + int(np.exp(rng.uniform(np.log(16), np.log(longest))))))
    return np.array(cuts)


def counted(cu_seqlens: np.ndarray, layout: str, ring: int) -> Traffic:
    return traffic(cut_at_documents(cu_seqlens, LAYOUTS[layout](cu_seqlens, ring), ring), ring)


def test_every_layout_can_be_asked_for_by_name() -> None:
    assert tuple(LAYOUTS) == get_args(Layout)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("ranks", [2, 7, 8, 64])
@pytest.mark.parametrize("longest", [300, 20_000, 65_000])
def test_work_exceeds_the_mean_by_no_more_than_the_tolerance(longest: int, ranks: int, tolerance: float) -> None:
    n_tokens = 1024 * ranks
    for seed in range(3):
        cu_seqlens = mixed(n_tokens, min(longest, n_tokens), seed)
        work = traffic(
            cut_at_documents(cu_seqlens, shared_over_fewest(cu_seqlens, ranks, tolerance), ranks), ranks
        ).work
        # A share is a whole number of tokens, and one more or less of the longest document is its length in work.
        token = np.diff(cu_seqlens).max() / work.mean()
        assert work.max() <= (1 + tolerance + token) * work.mean()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 9), st.sampled_from([0.0, 0.01, 0.3, 2.0]))
def test_any_documents_on_any_ranks_give_an_assignment(lengths: list[int], ranks: int, tolerance: float) -> None:
    lengths.append(-sum(lengths) % ranks or ranks)
    cu_seqlens = np.cumsum([0, *lengths])
    start, owner = shared_over_fewest(cu_seqlens, ranks, tolerance)
    assert start[0] == 0
    assert (np.diff(start) > 0).all()
    held = np.bincount(owner, np.diff(start, append=cu_seqlens[-1]), minlength=ranks)
    assert (held == cu_seqlens[-1] // ranks).all()


def test_a_document_that_fits_stays_whole() -> None:
    cu_seqlens = np.array([0, 100, 200, 300, 400])
    assert traffic(cut_at_documents(cu_seqlens, shared_over_fewest(cu_seqlens, 4, 0.01), 4), 4).keys.sum() == 0


def test_shares_of_one_document_have_equal_work_from_its_head_and_its_tail() -> None:
    start, owner = shared_over_fewest(np.array([0, 4096]), 8, 0.01)
    assert owner.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 0]
    work = counted(np.array([0, 4096]), TIGHTEST, 8).work
    assert work.max() == work.min()
    assert start.tolist() == [*range(0, 2048, 256), *range(2304, 4096, 256)]


def test_a_rank_takes_part_in_one_long_document_or_two_where_one_ends() -> None:
    # Four long documents have nearly all the work; short ones have most of the tokens and fill the ranks up.
    ring, long, n_long = 16, 4096, 4
    cu_seqlens = np.cumsum([0, *[long] * n_long, *[64] * 768])
    segments = cut_at_documents(cu_seqlens, LAYOUTS[TIGHTEST](cu_seqlens, ring), ring)
    taken = [
        len(np.unique(segments.document[(segments.rank == r) & (segments.document < n_long)])) for r in range(ring)
    ]
    assert min(taken) == 1
    assert max(taken) <= 2
    assert sum(taken) <= ring + n_long
    # Shared by all ranks, each document would send three quarters of its keys to every rank.
    assert traffic(segments, ring).keys.sum() < 0.4 * (0.75 * long * n_long * ring)


@pytest.mark.slow
def test_the_same_sequence_gives_the_same_plan_in_another_process() -> None:
    code = (
        "import hashlib, numpy as np\n"
        "from tests.model.attention.plan.test_planner import mixed, GQA, plan_sequence\n"
        "p = plan_sequence(mixed(65536, 30000, 5), 16, shape=GQA)\n"
        "print(p.layout, p.ulysses, p.route, hashlib.sha256(b''.join(x.tobytes() for x in p.assignment)).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sp", [1, 2, 8, 64])
def test_no_candidate_of_the_first_round_is_better_than_the_chosen(sp: int, seed: int) -> None:
    cu_seqlens, hardware = mixed(65536, 60000, seed), Hardware()
    plan = plan_sequence(cu_seqlens, sp, shape=GQA, hardware=hardware)
    chosen = min(
        c.cost.seconds for c in candidates(cu_seqlens, sp, (plan.layout,), plan.ulysses, plan.route, GQA, hardware)
    )
    others = candidates(cu_seqlens, sp, ("contiguous", "zigzag", TIGHTEST), None, None, GQA, hardware)
    assert chosen <= min(c.cost.seconds for c in others)


def test_what_is_asked_for_is_planned() -> None:
    plan = plan_sequence(mixed(4096, 2000, 0), 8, "zigzag", ulysses=2, route="relay", shape=GQA)
    assert (plan.layout, plan.ulysses, plan.ring, plan.route) == ("zigzag", 2, 4, "relay")


def test_without_a_shape_heads_are_left_alone() -> None:
    assert plan_sequence(np.array([0, 2**20]), 512).ulysses == 1


def test_a_node_whose_ranks_share_one_uplink_relays_a_document_that_spans_all() -> None:
    cu_seqlens, shape = np.array([0, 2**17]), AttentionShape(heads=8, kv_heads=1)
    assert plan_sequence(cu_seqlens, 64, shape=shape).route == "direct"
    shared = Hardware(uplink=Hardware().across)
    assert plan_sequence(cu_seqlens, 64, shape=shape, hardware=shared).route == "relay"


def test_cost_of_work_alone_is_its_operations() -> None:
    hardware, shape = Hardware(flops=1e12), AttentionShape(heads=4, kv_heads=2, head_size=8)
    work = np.array([1000, 3000])
    nothing = Traffic(work, work, np.zeros((2, 2), np.int64))
    cost = direct_cost(nothing, 64, 1, shape, hardware)
    assert cost.forward == pytest.approx(3000 * 4 * 4 * 8 / 1e12)
    assert cost.backward == pytest.approx(2.5 * cost.forward)
    assert cost.ulysses == 0
    assert cost.efficiency == pytest.approx(2000 / 3000)


def test_cost_of_keys_alone_is_their_bytes_over_the_slower_link() -> None:
    shape, n = AttentionShape(heads=4, kv_heads=2, head_size=8), 10**6
    keys = np.zeros((4, 4), np.int64)
    keys[1, 0] = n  # inside a node of two
    hardware = Hardware(flops=1e30, latency=0, ranks_per_node=2)
    idle = np.full(4, 1)
    inside = direct_cost(Traffic(idle, idle, keys), n, 1, shape, hardware)
    assert inside.forward == pytest.approx(n * shape.key_bytes / hardware.inside)
    # Back come the keys again, and their gradients go the other way, the last of them after all is computed.
    assert inside.backward == pytest.approx(n * max(shape.key_bytes, shape.gradient_bytes) / hardware.inside)
    keys[2, 1] = n  # across
    across = direct_cost(Traffic(idle, idle, keys), n, 1, shape, hardware)
    assert across.forward == pytest.approx(n * shape.key_bytes / hardware.across)
    halved = direct_cost(Traffic(idle[:2], idle[:2], keys[1:3, 1:3] * 1), n, 2, shape, hardware)
    assert halved.forward == pytest.approx(across.forward / 2)


def test_a_relay_moves_every_block_over_every_hop() -> None:
    shape, idle = AttentionShape(heads=4, kv_heads=2, head_size=8), np.full(16, 1)
    hardware = Hardware(flops=1e30, latency=0)
    cost = relay_cost(Traffic(idle, idle, np.zeros((16, 16), np.int64)), 1000, 1, shape, hardware)
    assert cost.forward == pytest.approx(15 * 1000 * shape.key_bytes / hardware.across)


def test_total_work_is_the_number_of_allowed_pairs() -> None:
    cu_seqlens = mixed(240, 100, 3)
    for layout in LAYOUTS:
        assert counted(cu_seqlens, layout, 4).work.sum() == allowed_pairs(cu_seqlens).sum()


@pytest.mark.parametrize("ranks", [1, 3, 4, 7])
def test_zigzag_needs_no_even_share(ranks: int) -> None:
    n_tokens = 15 * ranks
    work = counted(np.array([0, n_tokens]), "zigzag", ranks).work
    assert work.max() - work.min() <= n_tokens


@pytest.mark.parametrize(
    ("cu_seqlens", "sp", "layout", "ulysses", "message"),
    [
        ([0, 10], 4, "contiguous", None, "10 tokens cannot be shared equally by 4 ranks"),
        ([0, 8], 0, None, None, "by 0 ranks"),
        ([0, 8], 2, "striped", None, "'striped' is none of contiguous, zigzag"),
        ([0, 4, 4, 8], 2, None, None, "does not ascend"),
        ([4, 8], 1, None, None, "does not ascend"),
        ([0], 1, None, None, "does not ascend"),
        ([0, 16], 4, None, 3, "Ulysses degree of 3 does not divide 4 ranks and 8 kv heads"),
        ([0, 32], 16, None, 16, "Ulysses degree of 16 does not divide"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(cu_seqlens, sp, layout, ulysses, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sequence(np.array(cu_seqlens), sp, layout, ulysses, shape=GQA)
