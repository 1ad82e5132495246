"""The global order: every source in proportion, every sequence once a pass, any position without the ones before."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from tokenization.loader.order import SequenceOrder


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_each_source_is_used_up_once_a_pass(sizes: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    order = SequenceOrder(seed, tuple(sizes), tuple(map(float, weights)), epoch)
    source, sequence = order.at(np.arange(2000))
    for number, size in enumerate(sizes):
        drawn = sequence[source == number]
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size].tolist()) == list(range(size))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (0.16, 0.42, 0.42), (5, 0.001, 2), (1e-9, 1)])
def test_every_stretch_is_in_proportion(weights: tuple[float, ...]) -> None:
    order = SequenceOrder(3, (1000,) * len(weights), weights)
    source, _ = order.at(np.arange(3_000_000))
    share = np.array(weights) / sum(weights)
    for number in range(len(weights)):
        drawn = np.cumsum(source == number)
        expected = np.arange(1, len(source) + 1) * share[number]
        # One in a million for shares that no period of slots can hold exactly.
        assert np.abs(drawn - expected).max() <= len(weights) + 1 + 2e-6 * len(source)


def test_proportions_of_decimal_weights_are_exact_over_a_period() -> None:
    source, _ = SequenceOrder(0, (10, 10), (0.7, 0.3)).at(np.arange(41_000))
    assert np.bincount(source).tolist() == [28_700, 12_300]


@given(st.data(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_weights_are_shares_of_the_tokens_however_full_the_sequences_of_a_source_are(
    data: st.DataObject, seed: int
) -> None:
    """Of one source a sequence may hold a hundredth of what one of another holds, and its own may differ as much."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    weights = np.array(data.draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes))), float)
    rng = np.random.default_rng(seed)
    filled = [rng.integers(low := 10 ** rng.integers(0, 4), 10 * low, size) for size in sizes]
    order = SequenceOrder(seed, tuple(sizes), tuple(weights), tokens=tuple(int(one.sum()) for one in filled))
    source, sequence = order.at(np.arange(100_000))
    drawn = np.array([filled[number][sequence[source == number]].sum() for number in range(len(sizes))])
    # One sequence or so, and of the last pass of a source at most all, is what a stretch cannot hold in proportion.
    left = sum(one.sum() + one.max() for one in filled) / drawn.sum()
    np.testing.assert_allclose(drawn / drawn.sum(), weights / weights.sum(), atol=2 * left + 1e-5)


def test_equally_full_sources_are_drawn_as_without_their_tokens() -> None:
    positions = np.arange(5000)
    plain = SequenceOrder(3, (100, 40), (0.7, 0.3)).at(positions)
    np.testing.assert_array_equal(SequenceOrder(3, (100, 40), (0.7, 0.3), tokens=(5000, 2000)).at(positions), plain)


def test_a_source_half_as_full_is_drawn_twice_as_often() -> None:
    source, _ = SequenceOrder(0, (10, 10), (0.5, 0.5), tokens=(1000, 500)).at(np.arange(3 << 12))
    assert np.bincount(source).tolist() == [1 << 12, 2 << 12]


def test_without_weights_a_pass_of_each_source_ends_together() -> None:
    source, sequence = SequenceOrder(5, (6, 3, 1)).at(np.arange(10_000))
    for number, size in enumerate((6, 3, 1)):
        assert np.bincount(sequence[source == number]).tolist() == [1000] * size


def test_no_rank_draws_one_source_only() -> None:
    source, _ = SequenceOrder(0, (100, 100)).at(np.arange(4000))
    assert 0.4 < source[::2].mean() < 0.6


def test_a_position_needs_none_of_those_before() -> None:
    order = SequenceOrder(11, (70, 30), (0.5, 0.5))
    whole = np.stack(order.at(np.arange(5000)))
    far = np.array([4999, 17, 2500])
    np.testing.assert_array_equal(np.stack(order.at(far)), whole[:, far])
    assert np.stack(order.at(np.array([10**12]))).shape == (2, 1)


def test_seed_and_epoch_make_other_orders_and_the_same_make_the_same() -> None:
    def sequences(seed: int, epoch: int) -> list[int]:
        return SequenceOrder(seed, (1000,), epoch=epoch).at(np.arange(50))[1].tolist()

    assert sequences(1, 0) == sequences(1, 0)
    assert len({tuple(sequences(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_passes_differ() -> None:
    _, sequence = SequenceOrder(1, (500,)).at(np.arange(1000))
    assert sequence[:500].tolist() != sequence[500:].tolist()


def test_a_source_of_weight_0_is_left_out() -> None:
    source, _ = SequenceOrder(1, (10, 0, 10), (1, 0, 1)).at(np.arange(500))
    assert set(source.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((5, 5), (1.0,), "1 mix weights for 2 sources"),
        ((5,), (-1.0,), "must be 0 or more"),
        ((5,), (float("nan"),), "must be 0 or more"),
        ((5, 5), (0.0, 0.0), "at least one of them above 0"),
        ((5, 0), (1.0, 1.0), "source 1 of the mix holds no sequences"),
        ((), None, "at least one of them above 0"),
    ],
)
def test_weights_that_cannot_be_met_are_the_users_mistake(sizes: tuple, weights: tuple | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceOrder(0, sizes, weights)


def test_a_source_without_tokens_cannot_have_a_share_of_them() -> None:
    with pytest.raises(UserError, match="source 1 of the mix holds no tokens"):
        SequenceOrder(0, (5, 5), (1.0, 1.0), tokens=(10, 0))
    source, _ = SequenceOrder(0, (5, 5), (1.0, 0.0), tokens=(10, 0)).at(np.arange(20))
    assert set(source.tolist()) == {0}


def test_a_state_is_plain_json_and_belongs_to_its_order() -> None:
    order = SequenceOrder(4, (10,), epoch=2)
    assert order.position(json.loads(json.dumps(order.state(77)))) == 77
    with pytest.raises(UserError, match="seed 4 and epoch 2"):
        SequenceOrder(5, (10,), epoch=2).position(order.state(77))
