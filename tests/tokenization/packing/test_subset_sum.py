"""Filling from a pool: nothing is overfilled, nothing lost, few are left over, and hardly any room is wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.packing.subset_sum import LONG, fill_from


@given(
    st.integers(1, 5000).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120))),
    st.integers(0, 60),
    st.integers(0, 20_000),
)
@settings(deadline=None, max_examples=400)
def test_no_bin_is_overfilled_or_empty_and_no_more_is_left_over_than_allowed(
    case: tuple[int, list[int]], keep: int, keep_tokens: int
) -> None:
    capacity, lengths = case
    packed = np.array(lengths, dtype=np.int64)
    bin_of, n_bins = fill_from(packed, capacity, keep, keep_tokens)
    placed = bin_of >= 0
    loads = np.bincount(bin_of[placed], weights=packed[placed], minlength=n_bins)
    assert len(loads) == n_bins
    assert ((loads > 0) & (loads <= capacity)).all()
    assert np.count_nonzero(~placed) <= keep
    assert packed[~placed].sum() <= keep_tokens


@pytest.mark.parametrize("capacity", [1, 2, 63, 64, 65, 1024, 4095, 4096, 4097, 8192, 131_072, 262_144, 1 << 20])
def test_it_holds_at_the_edges_of_words_and_units(capacity: int) -> None:
    edges = [1, 2, 63, 64, 65, capacity // 64, capacity // LONG, capacity // LONG + 1, capacity // 2, capacity - 1]
    lengths = np.tile(np.clip(edges, 1, capacity), 9)
    bin_of, n_bins = fill_from(lengths, capacity, 0, 0)
    loads = np.bincount(bin_of, weights=lengths, minlength=n_bins)
    assert (loads <= capacity).all()
    assert loads.sum() == lengths.sum()


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_short_ones_whose_sums_are_dense_fill_bins_exactly(seed: int) -> None:
    """Any room of three means or more is the sum of some of the next few dozen: no token is wasted but in the last."""
    lengths = np.random.default_rng(seed).integers(30, 60, 1500)
    bin_of, n_bins = fill_from(lengths, 1024, 300, 1 << 30)
    loads = np.bincount(bin_of[bin_of >= 0], weights=lengths[bin_of >= 0], minlength=n_bins)
    assert (loads == 1024).all()


def test_room_left_for_short_ones_that_do_not_fit_goes_to_a_longer_one() -> None:
    lengths = np.array([1000, 590, 530, 90])
    bin_of, _ = fill_from(lengths, 1600, 2, 1 << 30)
    assert lengths[bin_of == 0].tolist() == [1000, 590]


def test_the_same_lengths_give_the_same_bins() -> None:
    lengths = np.random.default_rng(3).integers(1, 4096, 3000)
    once, again = (fill_from(lengths, 4096, 1000, 1 << 40) for _ in range(2))
    np.testing.assert_array_equal(once[0], again[0])
    assert once[1] == again[1]


def test_lengths_that_fit_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        fill_from(np.array([9]), 8, 0, 0)
