"""Dispatch: all ranks' shares together are the micro-batch, made ahead of the training, the same after a stop."""

from __future__ import annotations

import io
import pickle
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import LAYOUTS
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from testing.law_batch import CONTEXT, SEED, VOCABULARY, law_documents, tiny_config
from testing.reorder import in_order
from tokenization.loader.batch import MicroBatch
from tokenization.loader.loader import Loader
from tokenization.loader.order import SequenceOrder
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import write_shard

SHAPE = AttentionShape(heads=4, kv_heads=2, head_size=8, itemsize=4)


@st.composite
def micro_batches(draw: st.DrawFn, multiple_of: int) -> MicroBatch:
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    lengths[-1] += -sum(lengths) % multiple_of
    n = sum(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return MicroBatch(
        tokens=rng.integers(0, 1000, n, dtype=np.int32),
        labels=rng.integers(0, 1000, n, dtype=np.int32),
        loss_weight=rng.random(n, dtype=np.float32),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        keys=(),
    )


@given(data=st.data(), sp=st.sampled_from([1, 2, 3, 4, 8]), layout=st.sampled_from([None, *LAYOUTS]))
def test_the_shares_of_all_ranks_are_the_micro_batch(data: st.DataObject, sp: int, layout: str | None) -> None:
    batch = data.draw(micro_batches(sp))
    ulysses = data.draw(st.sampled_from([None, *(u for u in (1, 2) if sp % u == 0)]))
    shares = [Dispatcher(sp, rank, SHAPE, None, layout, ulysses)(batch) for rank in range(sp)]
    plan = shares[0].plan
    for name in ("tokens", "labels", "loss_weight"):
        whole = in_order([getattr(share, name) for share in shares], plan)
        np.testing.assert_array_equal(whole, getattr(batch, name))
    positions = in_order([share.positions for share in shares], plan)
    expected = np.concatenate([np.arange(n) for n in np.diff(batch.cu_seqlens)])
    np.testing.assert_array_equal(positions, expected)
    for share in shares:
        assert len(share.tokens) == len(batch.tokens) // sp
        assert share.tokens.dtype == share.positions.dtype == share.labels.dtype == torch.int64
        assert share.loss_weight.dtype == torch.float32


@given(data=st.data(), sp=st.sampled_from([1, 2, 4]))
def test_padding_is_neither_useful_nor_of_a_source(data: st.DataObject, sp: int) -> None:
    batch = data.draw(micro_batches(sp))
    lengths = np.diff(batch.cu_seqlens)
    number = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths))), np.int16)
    batch = replace(batch, source=np.repeat(number, lengths))
    shares = [Dispatcher(sp, rank, SHAPE, n_sources=3)(batch) for rank in range(sp)]
    np.testing.assert_array_equal(in_order([share.source for share in shares], shares[0].plan), batch.source)
    assert sum(share.useful_tokens for share in shares) == lengths[number >= 0].sum()
    pairs = sum(length * (length + 1) // 2 for length in lengths[number >= 0].tolist())
    assert sum(share.useful_pairs for share in shares) == pytest.approx(pairs)
    assert all(share.n_sources == 3 for share in shares)


def test_ranks_agree_on_the_plan_without_a_word() -> None:
    batch = joined()
    plans = [Dispatcher(4, rank, SHAPE)(batch).plan for rank in range(4)]
    for plan in plans:
        assert (plan.layout, plan.ulysses, plan.route) == (plans[0].layout, plans[0].ulysses, plans[0].route)
        assert all(np.array_equal(plan.indices(rank), plans[0].indices(rank)) for rank in range(4))


def test_nothing_of_the_plan_is_left_to_the_training_thread() -> None:
    assert set(Dispatcher(4, 2, SHAPE)(joined()).plan._rank_plans) == {2}


def test_choices_and_hardware_reach_the_planner() -> None:
    batch = joined()
    chosen = Dispatcher(4, 0, SHAPE, layout="zigzag", ulysses=2, route="direct")(batch).plan
    assert (chosen.layout, chosen.ulysses, chosen.ring, chosen.route) == ("zigzag", 2, 2, "direct")
    slow = Hardware(inside=1.0, across=1.0, latency=0.0)
    apart = MicroBatch(*(np.arange(64) for _ in range(3)), cu_seqlens=np.array([0, 16, 32, 48, 64]), keys=())
    assert not Dispatcher(4, 0, SHAPE, slow)(apart).plan.rank(0).stages, "a network this slow is left alone"
    with pytest.raises(ValueError, match="does not divide"):
        Dispatcher(4, 0, SHAPE, ulysses=4)(batch)


def test_the_shape_is_the_models() -> None:
    assert attention_shape(tiny_config(), "fp32") == SHAPE
    assert attention_shape(tiny_config(), "bf16").itemsize == 2


def test_moving_keeps_plan_and_values() -> None:
    share = Dispatcher(2, 1, SHAPE)(joined())
    moved = share.to("cpu")
    assert moved.plan is share.plan
    assert same(moved, share)
    assert same(pickle.loads(pickle.dumps(share)), share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_holds_the_same_numbers() -> None:
    share = Dispatcher(2, 1, SHAPE)(joined())
    there = share.to("cuda")
    assert {x.device.type for x in (there.tokens, there.positions, there.labels, there.loss_weight)} == {"cuda"}
    torch.cuda.synchronize()
    assert same(there.to("cpu"), share)


def test_a_loader_resumed_anywhere_dispatches_the_same_shares() -> None:
    file = io.BytesIO()
    sequences = pack(law_documents("vision-text") * 8, CONTEXT, VOCABULARY, "vision-text", seed=SEED)
    stats = write_shard(file, sequences, VOCABULARY)
    shards = ShardSet(CONTEXT, VOCABULARY, "vision-text", ("play.tar",), (stats,))
    order = SequenceOrder(SEED, (len(shards),))
    threads = set()
    dispatcher = Dispatcher(4, 3, SHAPE)

    def opened(_: str) -> io.BytesIO:
        return io.BytesIO(file.getvalue())

    def prepare(batch: MicroBatch) -> RankBatch:
        threads.add(threading.current_thread().name)
        return dispatcher(batch)

    def shares(state: dict | None, steps: int) -> tuple[list[RankBatch], dict]:
        geometry = {"dp_rank": 1, "dp_size": 2, "grad_accum": 2}
        loader = Loader(opened, [shards], order, 8, **geometry, state=state)
        seen = list(islice(loader.prepared(prepare), steps))
        return [share for batch, _ in seen for share in batch.micro_batches], seen[-1][1]

    whole, _ = shares(None, 6)
    first, state = shares(None, 2)
    second, _ = shares(state, 4)
    assert all(same(a, b) for a, b in zip([*first, *second], whole, strict=True))
    assert threads == {"loader"}


def joined() -> MicroBatch:
    """A document over a whole sequence, and some short ones."""
    lengths = [192, 120, 70, 1, 1]
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 300, (2, sum(lengths)), dtype=np.int32)
    return MicroBatch(tokens, labels, rng.random(len(tokens), dtype=np.float32), np.cumsum([0, *lengths]), keys=())


def same(a: RankBatch, b: RankBatch) -> bool:
    equal = (torch.equal(getattr(a, x), getattr(b, x)) for x in ("tokens", "positions", "labels", "loss_weight"))
    return all(equal) and all(np.array_equal(a.plan.indices(rank), b.plan.indices(rank)) for rank in range(a.plan.sp))
