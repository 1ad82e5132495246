"""The loader: the same sequences in the same order on any number of ranks, stopped and resumed at any step."""

import gc
import io
import json
import pickle
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from storage.errors import BadData, UserError
from tokenization.document import Document, PackedSequence
from tokenization.loader.batch import Batch, MicroBatch
from tokenization.loader.join import join_sequences
from tokenization.loader.loader import Loader
from tokenization.loader.order import SequenceOrder
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import read_sequence, write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=100, codebook_size=40)
CONTEXT = 32


def packed(name: str, n_sequences: int, objective="vision-text") -> list[PackedSequence]:
    rng = np.random.default_rng(len(name))

    def documents():
        number = 0
        while True:
            tokens = rng.integers(3, 100, rng.integers(2, 30)).astype(np.int32)
            yield Document(f"{name}{number}", name, tokens, ((1, len(tokens)),))
            number += 1

    return list(islice(pack(documents(), CONTEXT, VOCABULARY, objective, window=500, key_prefix=name), n_sequences))


class Store:
    """Shards in memory behind an opener that counts what is open."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.open = 0
        self.most_open = 0
        self.opened: Counter[str] = Counter()

    def add(self, name: str, sequences: list[PackedSequence], per_shard: int = 60, objective="vision-text") -> ShardSet:
        names, stats = [], []
        for start in range(0, len(sequences), per_shard):
            file = io.BytesIO()
            stats.append(write_shard(file, sequences[start : start + per_shard], VOCABULARY))
            names.append(f"{name}/{len(names):05d}.tar")
            self.bodies[names[-1]] = file.getvalue()
        return ShardSet(CONTEXT, VOCABULARY, objective, tuple(names), tuple(stats))

    def __call__(self, name: str) -> io.BytesIO:
        store = self

        class Opened(io.BytesIO):
            def close(self) -> None:
                store.open -= not self.closed
                super().close()

        self.open += 1
        self.most_open = max(self.most_open, self.open)
        self.opened[name] += 1
        return Opened(self.bodies[name])


@pytest.fixture(scope="module")
def corpus() -> tuple[Store, list[ShardSet]]:
    store = Store()
    return store, [store.add("text", packed("text", 300)), store.add("video", packed("video", 200))]


def order_of(sets: list[ShardSet], seed: int = 1, weights: tuple[float, ...] | None = None) -> SequenceOrder:
    return SequenceOrder(seed, tuple(map(len, sets)), weights)


def run_ranks(corpus, order, batch_sequences: int, dp: int, accum: int, steps: int, state=None):
    """Keys of `steps` global batches in dealing order, N of each, and the last state, from all ranks of a geometry."""
    store, sets = corpus
    per_rank = []
    for rank in range(dp):
        loader = Loader(store, sets, order, batch_sequences, dp_rank=rank, dp_size=dp, grad_accum=accum, state=state)
        per_rank.append(list(islice(iter(loader), steps)))
    keys, n_examples = [], []
    for step in zip(*per_rank):
        batches: list[Batch[MicroBatch]] = [batch for batch, _ in step]
        for micro in zip(*(batch.micro_batches for batch in batches)):
            keys += [key for micro_batch in micro for key in micro_batch.keys]
        assert len({batch.n_examples for batch in batches}) == 1, "all ranks must divide by one N"
        n_examples.append(batches[0].n_examples)
    states = {json.dumps(rank[-1][1], sort_keys=True) for rank in per_rank}
    assert len(states) == 1
    return keys, n_examples, json.loads(states.pop())


def test_a_thousand_sequences_keep_their_order_through_dp_4_2_1_stopped_each_time(corpus) -> None:
    order = order_of(corpus[1], weights=(0.7, 0.3))
    whole, whole_n, _ = run_ranks(corpus, order, 20, dp=1, accum=1, steps=50)
    first, first_n, state = run_ranks(corpus, order, 20, dp=4, accum=1, steps=17)
    second, second_n, state = run_ranks(corpus, order, 20, dp=2, accum=5, steps=20, state=state)
    third, third_n, state = run_ranks(corpus, order, 20, dp=1, accum=4, steps=13, state=state)
    assert len(whole) == 1000
    assert first + second + third == whole
    assert first_n + second_n + third_n == whole_n
    assert state == {"seed": 1, "epoch": 0, "position": 1000}


def test_keys_are_those_that_the_order_names(corpus) -> None:
    _, sets = corpus
    order = order_of(sets)
    keys, _, _ = run_ranks(corpus, order, 10, dp=2, accum=1, steps=3)
    expected = [sets[s].locate(int(n))[2].key for s, n in zip(*order.at(np.arange(30)))]
    assert keys == expected


def test_another_batch_size_goes_on_at_the_next_sequence(corpus) -> None:
    order = order_of(corpus[1])
    whole, _, _ = run_ranks(corpus, order, 6, dp=1, accum=1, steps=10)
    first, _, state = run_ranks(corpus, order, 6, dp=2, accum=1, steps=3)
    second, _, _ = run_ranks(corpus, order, 14, dp=1, accum=2, steps=3, state=state)
    assert first + second == whole


def test_n_is_the_examples_of_the_global_batch(corpus) -> None:
    store, sets = corpus
    batch, _ = next(iter(Loader(store, sets, order_of(sets), 8, dp_rank=1, dp_size=2, grad_accum=2)))
    entries = [sets[s].locate(int(n))[2] for s, n in zip(*order_of(sets).at(np.arange(8)))]
    assert batch.n_examples == sum(entry.n_examples for entry in entries)
    assert [len(micro.keys) for micro in batch.micro_batches] == [2, 2]


def test_weights_of_a_global_batch_sum_to_its_share_of_n(corpus) -> None:
    store, sets = corpus
    total, n = 0.0, 0
    for rank in range(4):
        loader = Loader(store, sets, order_of(sets), 16, dp_rank=rank, dp_size=4, grad_accum=2)
        batch, _ = next(iter(loader))
        total += sum(micro.loss_weight.sum(dtype=np.float64) for micro in batch.micro_batches)
        n = batch.n_examples
    assert total == pytest.approx(0.5 * n, rel=1e-6), "text examples weigh a half each"


def test_labels_are_the_next_token_of_the_same_document() -> None:
    first, second, *_ = packed("labels", 4)
    micro = join_sequences([first, second])
    assert micro.tokens.dtype == micro.labels.dtype == micro.cu_seqlens.dtype == np.int32
    assert micro.loss_weight.dtype == np.float32
    assert micro.cu_seqlens[0] == 0
    assert micro.cu_seqlens[-1] == len(micro.tokens) == 2 * CONTEXT
    assert micro.keys == (first.key, second.key)
    expected = Counter()
    for sequence, shift in ((first, 0), (second, CONTEXT)):
        for start, end in zip(sequence.cu_seqlens[: sequence.n_examples], sequence.cu_seqlens[1:]):
            assert start + shift in micro.cu_seqlens
            for t in range(start, end - 1):
                assert micro.labels[t + shift] == sequence.tokens[t + 1]
                assert micro.loss_weight[t + shift] == sequence.loss_weight[t + 1] > 0
                expected[t + shift] = 1
    ignored = [t for t in range(2 * CONTEXT) if not expected[t]]
    assert (micro.labels[ignored] == 0).all()
    assert (micro.loss_weight[ignored] == 0).all()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetching_changes_nothing(corpus, prefetch: int) -> None:
    store, sets = corpus
    loader = Loader(store, sets, order_of(sets), 4, prefetch=prefetch)
    seen = [(batch.micro_batches[0].keys, state) for batch, state in islice(iter(loader), 6)]
    again = [(batch.micro_batches[0].keys, state) for batch, state in islice(iter(loader), 6)]
    assert seen == again, "each iteration starts from the loader's state"
    assert [state["position"] for _, state in seen] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize(("prefetch", "thread"), [(0, "MainThread"), (2, "loader")])
def test_micro_batches_are_prepared_where_they_are_read(corpus, prefetch: int, thread: str) -> None:
    store, sets = corpus
    names = set()

    def prepare(micro_batch: MicroBatch) -> tuple[str, ...]:
        names.add(threading.current_thread().name)
        assert thread == "MainThread" or threading.current_thread().daemon, "a process ends though it reads"
        return micro_batch.keys

    geometry = {"dp_size": 2, "dp_rank": 1, "grad_accum": 2, "prefetch": prefetch}
    plain = list(islice(iter(Loader(store, sets, order_of(sets), 8, **geometry)), 3))
    prepared = list(islice(Loader(store, sets, order_of(sets), 8, **geometry).prepared(prepare), 3))
    assert names == {thread}
    for (batch, state), (expected, expected_state) in zip(prepared, plain, strict=True):
        assert batch.micro_batches == tuple(micro_batch.keys for micro_batch in expected.micro_batches)
        assert (batch.n_examples, state) == (expected.n_examples, expected_state)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_preparation_surface_in_the_consumer(corpus, prefetch: int) -> None:
    store, sets = corpus
    calls = iter(range(9))

    def prepare(micro_batch: MicroBatch) -> MicroBatch:
        if next(calls) == 2:
            raise ValueError("no plan for this one")
        return micro_batch

    steps = Loader(store, sets, order_of(sets), 4, prefetch=prefetch).prepared(prepare)
    assert len(list(islice(steps, 2))) == 2, "what lies before is delivered"
    with pytest.raises(ValueError, match="no plan for this one"):
        next(steps)


def test_prefetching_is_bounded(corpus) -> None:
    store, sets = corpus
    counting = Store()
    counting.bodies = store.bodies
    steps = iter(Loader(counting, sets, order_of(sets), 4, prefetch=2, max_open=1))
    next(steps)
    time.sleep(0.5)
    # One step handed out, two ahead: 12 sequences, each at most one opening.
    assert 8 <= counting.opened.total() <= 12
    steps.close()


def test_open_shards_are_bounded_and_closed(corpus) -> None:
    store, sets = corpus
    store.most_open = store.open = 0
    steps = iter(Loader(store, sets, order_of(sets), 50, max_open=3))
    for _ in range(4):
        next(steps)
    assert store.most_open == 3
    steps.close()
    assert store.open == 0


def test_an_abandoned_loader_leaves_no_thread(corpus) -> None:
    store, sets = corpus
    before = set(threading.enumerate())
    steps = iter(Loader(store, sets, order_of(sets), 4, prefetch=1))
    next(steps)
    (own,) = (thread for thread in threading.enumerate() if thread.name == "loader" and thread not in before)
    del steps
    gc.collect()
    assert not own.is_alive()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_corrupt_sequence_is_named_with_its_shard(corpus, prefetch: int) -> None:
    store, sets = corpus
    order = order_of(sets)
    source, number = order.at(np.array([9]))
    name, _, entry = sets[int(source[0])].locate(int(number[0]))
    damaged = bytearray(store.bodies[name])
    damaged[entry.offset + 100] ^= 4
    broken = Store()
    broken.bodies = {**store.bodies, name: bytes(damaged)}
    steps = iter(Loader(broken, sets, order, 4, prefetch=prefetch))
    assert len(list(islice(steps, 2))) == 2, "what lies before is delivered"
    said = f"shard {name}: sequence {entry.key} is corrupt: .*; the shard's sha256 is [0-9a-f]{{64}}, the manifest says"
    with pytest.raises(BadData, match=said):
        next(steps)


def test_a_sequence_damaged_on_its_way_is_read_once_more(corpus) -> None:
    store, sets = corpus
    damaged = []

    class Flaky(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            body = super().read(size)
            if self not in damaged:
                damaged.append(self)
                return body[:200] + b"?" + body[201:]
            return body

    order = order_of(sets)
    expected = [batch.micro_batches[0].keys for batch, _ in islice(iter(Loader(store, sets, order, 50)), 4)]
    flaky = Loader(lambda name: Flaky(store.bodies[name]), sets, order, 50, prefetch=0)
    assert [batch.micro_batches[0].keys for batch, _ in islice(iter(flaky), 4)] == expected
    assert len(damaged) >= 8


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_shards_become_padding_and_move_nothing_else(corpus, workers: int) -> None:
    store, sets = corpus
    order = order_of(sets)
    bad = {sets[0].names[1], sets[1].names[0]}
    left = Store()
    left.bodies = {name: body for name, body in store.bodies.items() if name not in bad}
    n_lost = 0
    for rank in range(2):
        geometry = {"dp_rank": rank, "dp_size": 2, "grad_accum": 5, "workers": workers}
        whole = islice(iter(Loader(store, sets, order, 20, **geometry)), 10)
        skipping = islice(iter(Loader(left, sets, order, 20, **geometry, skip=bad)), 10)
        for position, ((full, state), (batch, same_state)) in enumerate(zip(whole, skipping)):
            places = [sets[s].locate(int(n)) for s, n in zip(*order.at(np.arange(20 * position, 20 * position + 20)))]
            assert batch.lost == tuple(entry.key for name, _, entry in places if name in bad)
            assert batch.n_examples == sum(entry.n_examples for name, _, entry in places if name not in bad)
            assert state == same_state
            for one, other in zip(full.micro_batches, batch.micro_batches, strict=True):
                assert one.keys == other.keys
                for row, key in enumerate(one.keys):
                    here = slice(row * CONTEXT, (row + 1) * CONTEXT)
                    lost = key in batch.lost
                    n_lost += lost
                    assert (other.loss_weight[here] == (0 if lost else one.loss_weight[here])).all()
                    assert (other.tokens[here] == (0 if lost else one.tokens[here])).all()
    assert n_lost > 20


def test_a_batch_of_nothing_but_losses_divides_by_one(corpus) -> None:
    store, sets = corpus
    batch, _ = next(iter(Loader(store, sets, order_of(sets), 4, skip=[name for one in sets for name in one.names])))
    assert batch.n_examples == 1
    assert len(batch.lost) == 4
    assert not batch.micro_batches[0].loss_weight.any()
    assert (np.diff(batch.micro_batches[0].cu_seqlens) > 0).all()


def test_nothing_read_is_ever_unpickled(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sets = corpus
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    assert len(list(islice(iter(Loader(store, sets, order_of(sets), 50, prefetch=0, verify=True)), 10))) == 10


def test_verification_finds_what_no_sequence_shows(corpus) -> None:
    store, sets = corpus
    name = sets[0].names[0]
    damaged = Store()
    damaged.bodies = {**store.bodies, name: store.bodies[name] + b"\0"}
    with pytest.raises(BadData, match=f"shard {name}: sha256"):
        list(islice(iter(Loader(damaged, sets, order_of(sets), 50, verify=True)), 10))
    checked = Store()
    checked.bodies = store.bodies
    assert list(islice(iter(Loader(checked, sets, order_of(sets), 5, verify=True)), 2))


def test_errors_of_the_opener_surface_in_the_consumer(corpus) -> None:
    _, sets = corpus

    def refuse(name: str) -> io.BytesIO:
        raise PermissionError(name)

    with pytest.raises(PermissionError):
        next(iter(Loader(refuse, sets, order_of(sets), 4)))


def test_shards_on_disk_are_read_through_open(tmp_path: Path) -> None:
    sequences = packed("disk", 10)
    with (tmp_path / "a.tar").open("wb") as file:
        stats = write_shard(file, sequences, VOCABULARY)
    shards = ShardSet(CONTEXT, VOCABULARY, "vision-text", ("a.tar",), (stats,))
    loader = Loader(lambda name: (tmp_path / name).open("rb"), [shards], order_of([shards]), 10)
    batch, _ = next(iter(loader))
    assert sorted(batch.micro_batches[0].keys) == sorted(sequence.key for sequence in sequences)
    with (tmp_path / "a.tar").open("rb") as file:
        assert read_sequence(file, stats.index[0]).key == sequences[0].key


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"dp_size": 3}, "a global batch of 20 sequences does not divide into 3 data-parallel ranks x 1 accum"),
        ({"dp_size": 4, "grad_accum": 2}, "does not divide"),
        ({"dp_size": 40}, "does not divide"),
        ({"dp_size": 2, "rows": 4}, "takes 3 accumulation steps of 2 data-parallel ranks x 4 rows, not 1"),
        ({"dp_size": 2, "rows": 4, "grad_accum": 4}, "takes 3 accumulation steps"),
        ({"dp_size": 2, "dp_rank": 2}, "dp_rank 2 is not one of 2"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(corpus, geometry: dict, message: str) -> None:
    store, sets = corpus
    with pytest.raises(ValueError, match=message):
        Loader(store, sets, order_of(sets), 20, **geometry)


def test_sources_that_do_not_belong_together_are_refused(corpus) -> None:
    store, (text, video) = corpus
    with pytest.raises(UserError, match="different objective"):
        Loader(store, [text, replace(video, objective="text")], order_of([text, video]), 4)
    other = replace(video, vocabulary=JointVocabulary.for_codebook(99, 40))
    with pytest.raises(UserError, match="different vocabulary"):
        Loader(store, [text, other], order_of([text, video]), 4)
    with pytest.raises(ValueError, match="share a shard name"):
        Loader(store, [text, text], order_of([text, text]), 4)
    with pytest.raises(ValueError, match="the order is over"):
        Loader(store, [text], order_of([text, video]), 4)


def test_a_state_of_another_seed_is_refused(corpus) -> None:
    store, sets = corpus
    with pytest.raises(UserError, match="seed 2 and epoch 0"):
        Loader(store, sets, order_of(sets), 4, state={"seed": 2, "epoch": 0, "position": 8})
