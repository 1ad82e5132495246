"""The stateless permutation: a bijection, named by its key, spread over all permutations."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.permutation import derive_key, permute


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1))
def test_every_element_has_exactly_one_image(size: int, seed: int) -> None:
    image = permute(np.arange(size), size, derive_key(seed))
    assert sorted(image.tolist()) == list(range(size))


def test_single_elements_agree_with_the_whole() -> None:
    key = derive_key(7, 1)
    whole = permute(np.arange(1000), 1000, key)
    assert [int(permute(np.array([i]), 1000, key)[0]) for i in (0, 3, 999)] == whole[[0, 3, 999]].tolist()


def test_elements_may_carry_keys_of_their_own() -> None:
    keys = derive_key(7, np.array([0, 0, 1, 1]))
    mixed = permute(np.array([4, 5, 4, 5]), 10, keys)
    apart = [permute(np.array([4, 5]), 10, derive_key(7, part)) for part in (0, 1)]
    assert mixed.tolist() == np.concatenate(apart).tolist()


def test_another_order_of_the_parts_is_another_key() -> None:
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key(0) != derive_key(0, 0)


@pytest.mark.parametrize("size", [3, 4])
def test_small_permutations_are_near_uniform_over_seeds(size: int) -> None:
    n_seeds = 24_000
    keys = derive_key(np.arange(n_seeds)).repeat(size)
    images = permute(np.tile(np.arange(size), n_seeds), size, keys).reshape(n_seeds, size)
    seen = Counter(map(tuple, images.tolist()))
    n_permutations = 6 if size == 3 else 24
    assert len(seen) == n_permutations
    assert max(seen.values()) < 1.35 * n_seeds / n_permutations
    assert min(seen.values()) > 0.65 * n_seeds / n_permutations


def test_large_permutations_leave_no_trend_between_neighbours() -> None:
    image = permute(np.arange(100_000), 100_000, derive_key(3))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 0.02


def test_a_permutation_of_400_million_costs_no_memory() -> None:
    image = permute(np.arange(399_999_000, 400_000_000), 400_000_000, derive_key(0))
    assert len(set(image.tolist())) == 1000
    assert image.max() < 400_000_000


def test_the_first_images_are_pinned_so_that_old_runs_can_be_repeated() -> None:
    assert permute(np.arange(8), 8, derive_key(0)).tolist() == [5, 7, 6, 1, 3, 2, 4, 0]


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="outside a permutation of 5"):
        permute(np.array([5]), 5, derive_key(0))
