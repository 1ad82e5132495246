"""The peers' layouts are as published, and what comes of them agrees with counting pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mixes import document_mix, useful_pairs
from benchmarks.peers import PEERS, direct_outcome, min_heap, pad_documents, per_document_zigzag
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.layouts import Assignment, contiguous
from model.attention.plan.segments import cut_at_documents, traffic

SHAPE, HARDWARE = AttentionShape(heads=32, kv_heads=8), Hardware()


def held(assignment: Assignment, n_tokens: int, ranks: int) -> np.ndarray:
    return np.bincount(assignment.owner, np.diff(assignment.start, append=n_tokens), minlength=ranks)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([1, 2, 3, 8]))
def test_peers_layouts_give_all_ranks_equally_many_tokens(lengths: list[int], ranks: int) -> None:
    lengths[-1] += -sum(lengths) % ranks
    cu_seqlens = np.cumsum([0, *lengths])
    padded = pad_documents(cu_seqlens, ranks)
    layouts = {cu_seqlens[-1]: min_heap(cu_seqlens, ranks), padded[-1]: per_document_zigzag(padded, ranks)}
    for n_tokens, assignment in layouts.items():
        assert assignment.start[0] == 0
        assert (np.diff(assignment.start, append=n_tokens) > 0).all()
        assert (held(assignment, n_tokens, ranks) == n_tokens // ranks).all()


def test_min_heap_deals_chunks_of_512_and_of_an_eighth_of_small_shares() -> None:
    assert (np.diff(min_heap(np.array([0, 2**15]), 4).start) == 512).all()
    assert (np.diff(min_heap(np.array([0, 2**12]), 8).start) == 64).all()


def test_min_heap_gives_the_costliest_chunks_to_different_ranks() -> None:
    owner = min_heap(np.array([0, 256]), 4).owner  # 32 chunks of ascending work
    assert sorted(owner[-4:]) == [0, 1, 2, 3]
    assert owner[-1] == 0


def test_per_document_zigzag_pads_documents_and_pairs_chunks_outside_in() -> None:
    padded = pad_documents(np.array([0, 3, 12]), 2)
    assert padded.tolist() == [0, 4, 16]
    assignment = per_document_zigzag(padded, 2)
    assert assignment.start.tolist() == [0, 1, 2, 3, 4, 7, 10, 13]
    assert assignment.owner.tolist() == [0, 1, 1, 0] * 2


def test_an_lwm_ring_computes_every_pair_and_receives_all_keys() -> None:
    outcome = PEERS["lwm_ring"](np.array([0, 512, 1024]), 8, 1, SHAPE, HARDWARE)
    assert outcome.work_over_mean == pytest.approx(1024**2 / (512 * 513))
    assert outcome.keys == outcome.most_keys == 7 / 8
    assert outcome.peers == 2


@pytest.mark.parametrize("ulysses", [1, 2])
def test_per_document_zigzags_work_is_that_of_its_padded_sequence(ulysses: int) -> None:
    cu_seqlens, ring = document_mix("lwm", 2**14, seed=1), 8 // ulysses
    outcome = PEERS["per_document_zigzag"](cu_seqlens, ring, ulysses, SHAPE, HARDWARE)
    padded = pad_documents(cu_seqlens, ring)
    counted = traffic(cut_at_documents(padded, per_document_zigzag(padded, ring), ring), ring)
    assert (counted.work == counted.work[0]).all()
    assert outcome.work_over_mean == pytest.approx(counted.work[0] * ring / useful_pairs(cu_seqlens))
    assert outcome.keys == pytest.approx((ring - 1) / ring * padded[-1] / 2**14 / ulysses)


def test_padding_is_work_that_is_not_useful() -> None:
    short, fitting = np.arange(0, 1025, 16), np.array([0, 1024])
    wasteful, sparing = (PEERS["per_document_zigzag"](cu, 16, 1, SHAPE, HARDWARE) for cu in (short, fitting))
    assert wasteful.work_over_mean > 3
    assert sparing.work_over_mean == pytest.approx(1)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_no_peer_beats_the_ideal(peer: str, ulysses: int) -> None:
    cu_seqlens = document_mix("lwm", 2**14, seed=1)
    outcome = PEERS[peer](cu_seqlens, 8 // ulysses, ulysses, SHAPE, HARDWARE)
    assert 0 < outcome.ideal < outcome.seconds
    assert outcome.work_over_mean >= 1
    assert outcome.ideal == pytest.approx(PEERS["lwm_ring"](cu_seqlens, 8, 1, SHAPE, HARDWARE).ideal)


def test_whole_documents_on_their_ranks_need_no_keys_and_no_peers() -> None:
    cu_seqlens = np.array([0, 64, 128])
    outcome = direct_outcome("contiguous", cu_seqlens, contiguous(128, 2), 2, 1, SHAPE, HARDWARE)
    assert (outcome.keys, outcome.peers, outcome.work_over_mean) == (0, 0, 1)
    assert outcome.seconds == pytest.approx(outcome.ideal)
