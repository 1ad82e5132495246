"""The order of training through changes of geometry and of how reading is spread over threads, proven by keys."""

from __future__ import annotations

import io
import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.document import PackedSequence
from tokenization.loader.loader import IDLE, Loader, accumulation
from tokenization.loader.order import SequenceOrder
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=100, codebook_size=40)
BATCH = 40


def tiny_shards(source: str, n_sequences: int, per_shard: int = 500) -> tuple[dict[str, bytes], ShardSet]:
    """Sequences of 4 tokens, whose first is their number modulo 90."""
    boundaries, weight = np.array([0, 4], np.int32), np.array([0, 0.25, 0.25, 0.5], np.float32)
    bodies, stats = {}, []
    for start in range(0, n_sequences, per_shard):
        file = io.BytesIO()
        numbers = range(start, min(start + per_shard, n_sequences))
        tokens = [np.array([3 + n % 90, 4, 5, 6], np.int32) for n in numbers]
        sequences = [PackedSequence(f"{source}{n}", t, boundaries, weight, 1, ({},)) for n, t in zip(numbers, tokens)]
        stats.append(write_shard(file, sequences, VOCABULARY))
        bodies[f"{source}-{start}.tar"] = file.getvalue()
    return bodies, ShardSet(4, VOCABULARY, "text", tuple(bodies), tuple(stats))


def keys_of(bodies, sets, order, *, dp: int, steps: int, state=None, grad_accum: int = 1, **reading):
    """Keys in dealing order from all ranks of a geometry, each stopped after `steps`, and the state they agree on."""
    ranks = []
    for dp_rank in range(dp):
        loader = Loader(
            lambda name: io.BytesIO(bodies[name]),
            sets,
            order,
            BATCH,
            dp_rank=dp_rank,
            dp_size=dp,
            grad_accum=grad_accum,
            state=state,
            **reading,
        )
        batches = iter(loader)
        ranks.append(list(islice(batches, steps)))
        batches.close()  # stopped in the middle of whatever it reads ahead
    keys = []
    for step in zip(*ranks):
        for micro_batches in zip(*(batch.micro_batches for batch, _ in step)):
            for micro_batch in micro_batches:
                assert [int(key.lstrip("abc")) % 90 + 3 for key in micro_batch.keys] == micro_batch.tokens[::4].tolist()
                keys += micro_batch.keys
    states = {json.dumps(rank[-1][1]) for rank in ranks}
    assert len(states) == 1
    return keys, json.loads(states.pop())


def test_ten_thousand_sequences_keep_their_order_through_dp_4_2_8_and_0_to_2_workers() -> None:
    bodies, shards = tiny_shards("a", 10_000)
    order = SequenceOrder(7, (10_000,))
    first, state = keys_of(bodies, [shards], order, dp=4, steps=83, prefetch=0, workers=0)
    assert state == {"seed": 7, "epoch": 0, "position": 83 * BATCH}
    second, state = keys_of(bodies, [shards], order, dp=2, steps=91, prefetch=2, workers=2, grad_accum=5, state=state)
    third, state = keys_of(bodies, [shards], order, dp=8, steps=76, prefetch=2, workers=0, state=state)
    assert state["position"] == 10_000
    _, numbers = order.at(np.arange(10_000))
    assert first + second + third == [f"a{number}" for number in numbers]
    assert len(set(first + second + third)) == 10_000, "each exactly once"


@pytest.fixture(scope="module")
def mix() -> tuple[dict[str, bytes], list[ShardSet], SequenceOrder, list[str]]:
    """Three sources by weight, the smallest repeating within what is read, and the keys in their order."""
    made = [tiny_shards("a", 900, 100), tiny_shards("b", 70, 20), tiny_shards("c", 200, 70)]
    bodies = {name: body for shards, _ in made for name, body in shards.items()}
    sets = [shard_set for _, shard_set in made]
    order = SequenceOrder(3, (900, 70, 200), (0.5, 0.2, 0.3), tokens=(3600, 140, 777))
    keys = [f"{'abc'[source]}{number}" for source, number in zip(*order.at(np.arange(1600)))]
    return bodies, sets, order, keys


run = st.fixed_dictionaries(
    {
        "dp": st.sampled_from([1, 2, 4, 8]),
        "grad_accum": st.sampled_from([1, 5]),
        "steps": st.integers(1, 5),
        "prefetch": st.sampled_from([0, 1, 3]),
        "workers": st.sampled_from([0, 1, 2]),
        "max_open": st.sampled_from([1, 8]),
    }
)


@settings(max_examples=12)
@given(runs=st.lists(run, min_size=1, max_size=4))
def test_any_series_of_stops_and_geometries_reads_the_one_order(mix, runs: list[dict]) -> None:
    bodies, sets, order, expected = mix
    read, state = [], None
    for geometry in runs:
        keys, state = keys_of(bodies, sets, order, state=state, **geometry)
        read += keys
    assert read == expected[: len(read)]


@pytest.mark.parametrize(("dp", "rows"), [(3, 1), (7, 1), (3, 4), (6, 2), (16, 3)])
def test_a_batch_that_does_not_go_round_keeps_its_sequences_and_is_filled_up_with_what_teaches_nothing(
    dp: int, rows: int
) -> None:
    bodies, shards = tiny_shards("a", 400)
    order = SequenceOrder(7, (400,))
    even, state = keys_of(bodies, [shards], order, dp=4, steps=3)
    grad_accum = accumulation(BATCH, dp, rows)
    ranks = []
    for dp_rank in range(dp):
        geometry = {"dp_rank": dp_rank, "dp_size": dp, "grad_accum": grad_accum, "rows": rows}
        loader = Loader(lambda name: io.BytesIO(bodies[name]), [shards], order, BATCH, **geometry)
        batches = iter(loader)
        ranks.append(list(islice(batches, 3)))
        batches.close()
    assert {json.dumps(rank[-1][1]) for rank in ranks} == {json.dumps(state)}
    keys = []
    for step in zip(*ranks):
        assert {batch.n_examples for batch, _ in step} == {BATCH}
        assert {len(batch.micro_batches) for batch, _ in step} == {grad_accum}
        for micro_batches in zip(*(batch.micro_batches for batch, _ in step)):
            for micro_batch in micro_batches:
                assert len(micro_batch.tokens) == 4 * rows, "the same shape on every rank"
                idle = np.repeat([key == IDLE for key in micro_batch.keys], 4)
                assert not micro_batch.loss_weight[idle].any()
                assert micro_batch.loss_weight[~idle].sum() == pytest.approx(np.count_nonzero(~idle) / 4)
                keys += [key for key in micro_batch.keys if key != IDLE]
    assert keys == even
