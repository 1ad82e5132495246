"""Packing: every token once, in order, in bins that hold it, filled as well as best-fit-decreasing can."""

import bisect
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.document import Document, PackedSequence
from tokenization.packing.best_fit import best_fit
from tokenization.packing.pack import TOO_SHORT, PackCounts, filled, pack, pack_batches, pack_window
from tokenization.shards.document_parquet import to_batch
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=1 << 20, codebook_size=20)


def numbered(lengths: list[int]) -> list[Document]:
    """Text documents in which no two tokens are alike, so that a token out of place shows."""
    starts = np.cumsum([1, *lengths])
    return [
        Document(f"d{i}", "test", np.arange(start, start + n, dtype=np.int32), ((0, n),), {"object": i})
        for i, (start, n) in enumerate(zip(starts, lengths))
    ]


def pack_one_by_one(documents: Iterator[Document], context: int, **limits: int) -> Iterator[PackedSequence]:
    """Packed from batches of one document, so that it shows how many are read ahead."""
    return pack_batches((to_batch([document]) for document in documents), context, VOCABULARY, "text", **limits)


def text_mix(seed: int, n: int, context: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(context / 12), 1.1, n), 2, context).astype(np.int64)


def simple_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Loads of the bins, by the definition."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return sorted(capacity - room for room in rooms)


def first_fit_bins(lengths: np.ndarray, capacity: int) -> int:
    rooms = np.zeros(0, dtype=np.int64)
    for length in lengths:
        fitting = np.flatnonzero(rooms >= length)
        if len(fitting):
            rooms[fitting[0]] -= length
        else:
            rooms = np.append(rooms, capacity - length)
    return len(rooms)


@given(st.integers(1, 5000).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
@settings(deadline=None, max_examples=300)
def test_best_fit_fills_bins_exactly_as_the_definition_does(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bin_of, n_bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    loads = np.bincount(bin_of, weights=lengths, minlength=n_bins) if lengths else np.zeros(0)
    assert sorted(loads.astype(int).tolist()) == simple_best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4095, 4096, 4097, 262_144, 1 << 20])
def test_best_fit_at_the_edges_of_its_bitmap(capacity: int) -> None:
    lengths = np.unique(np.clip([1, 2, 62, 63, 64, 65, capacity // 2, capacity // 2 + 1, capacity - 1], 1, capacity))
    lengths = np.tile(lengths, 7)
    bin_of, n_bins = best_fit(lengths, capacity)
    loads = np.bincount(bin_of, weights=lengths, minlength=n_bins).astype(int)
    assert sorted(loads.tolist()) == simple_best_fit_decreasing(lengths.tolist(), capacity)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("context", [256, 4096])
def test_fill_is_at_least_that_of_first_fit_on_random_mixes(seed: int, context: int) -> None:
    lengths = text_mix(seed, 600, context)
    assert best_fit(lengths, context)[1] <= first_fit_bins(lengths, context)


def test_a_window_of_ten_thousand_fills_99_5_percent() -> None:
    lengths = text_mix(0, 10_000, 32_768)
    assert lengths.sum() / (best_fit(lengths, 32_768)[1] * 32_768) > 0.995


def test_lengths_that_fit_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        best_fit(np.array([9]), 8)
    with pytest.raises(ValueError, match=r"1\.\.8"):
        best_fit(np.array([0]), 8)


@given(
    st.lists(st.integers(1, 100), max_size=60),
    st.integers(2, 40),
    st.integers(1, 20),
    st.integers(1, 200),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_every_token_appears_exactly_once_and_in_order(
    lengths: list[int], context: int, window: int, window_tokens: int, seed: int
) -> None:
    documents = numbered(lengths)
    counts = PackCounts()
    sequences = list(
        pack(
            documents,
            context,
            VOCABULARY,
            "text",
            window=window,
            window_tokens=window_tokens,
            seed=seed,
            key_prefix="p-",
            counts=counts,
        )
    )
    found: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for number, sequence in enumerate(sequences):
        assert sequence.key == f"p-{number:08d}"
        assert len(sequence.tokens) == context == sequence.cu_seqlens[-1]
        assert filled(sequence) <= context
        assert (sequence.tokens[filled(sequence) :] == 0).all()
        assert (sequence.loss_weight[filled(sequence) :] == 0).all()
        assert (sequence.loss_weight[sequence.cu_seqlens[:-1]] == 0).all()
        assert len(sequence.cu_seqlens) - 1 - sequence.n_examples == (filled(sequence) < context)
        assert sequence.loss_weight.sum(dtype=np.float64) == pytest.approx(sequence.n_examples, abs=1e-5)
        for part, start, end in zip(sequence.lineage, sequence.cu_seqlens[:-1], sequence.cu_seqlens[1:]):
            key, _, at = part["key"].partition("@")
            assert part["length"] == end - start
            found[key][int(at or 0)] = sequence.tokens[start:end]
    dropped = 0
    for document in documents:
        pieces = [found[document.key][at] for at in sorted(found[document.key])]
        together = np.concatenate([np.zeros(0, np.int32), *pieces])
        # All of it, but for a last piece of one token, from which nothing can be predicted.
        lost = len(document) % context == 1
        dropped += lost
        np.testing.assert_array_equal(together, document.tokens[: len(document) - lost])
    assert counts.skipped == ({TOO_SHORT: dropped} if dropped else {})
    assert counts.documents == len(documents)
    assert counts.sequences == len(sequences)
    assert counts.examples == sum(sequence.n_examples for sequence in sequences)
    assert counts.tokens == sum(map(filled, sequences))


def everything(sequences: list[PackedSequence]) -> list[tuple]:
    return [(s.key, s.tokens.tobytes(), s.cu_seqlens.tobytes(), s.loss_weight.tobytes(), s.lineage) for s in sequences]


def test_the_same_input_and_seed_give_the_same_sequences_and_another_seed_another_order() -> None:
    documents = numbered(text_mix(1, 300, 256).tolist())

    def packed(seed: int) -> list[PackedSequence]:
        return list(pack(documents, 256, VOCABULARY, "text", window=100, seed=seed))

    assert everything(packed(0)) == everything(packed(0))
    orders = [[part["key"] for s in packed(seed) for part in s.lineage] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_what_comes_out_of_a_window_does_not_depend_on_what_follows() -> None:
    documents = numbered(text_mix(3, 400, 256).tolist())
    whole = everything(list(pack(documents, 256, VOCABULARY, "text", window=100)))

    def broken() -> Iterator[Document]:
        yield from documents[:200]
        raise InterruptedError

    came_out: list[PackedSequence] = []
    with pytest.raises(InterruptedError):
        came_out.extend(pack_one_by_one(broken(), 256, window=100))
    assert len(came_out) > 10
    assert everything(came_out) == whole[: len(came_out)]


@given(st.integers(2, 3000).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))))
@settings(deadline=None, max_examples=200)
def test_documents_that_end_within_their_window_need_no_more_sequences_than_by_best_fit(
    case: tuple[int, list[int]],
) -> None:
    context, lengths = case
    packed = np.array(lengths, dtype=np.int64)
    sequence_of, n_sequences = pack_window(packed, context, 0, 0)
    assert n_sequences <= best_fit(packed, context)[1]
    assert (sequence_of >= 0).all()


def test_windows_do_not_end_with_sequences_that_have_little_in_them() -> None:
    context = 16_384
    lengths = np.maximum(text_mix(5, 4000, context) // 8, 2)  # about eight sequences a window
    apart = sum(best_fit(lengths[start : start + 500], context)[1] for start in range(0, 4000, 500))
    documents = [Document(str(i), "test", np.full(n, 5, dtype=np.int32), ((0, n),)) for i, n in enumerate(lengths)]
    sequences = list(pack(documents, context, VOCABULARY, "text", window=500))
    assert len(sequences) == -(-lengths.sum() // context) < apart


def test_neighbours_are_not_sorted_by_modality() -> None:
    """Sources in which all pictures come first: half the documents vision, in order, and short as those are."""
    rng = np.random.default_rng(6)
    vision = [
        np.full(n, VOCABULARY["vision"].codes_to_ids(np.array([1]))[0], dtype=np.int32)
        for n in rng.integers(20, 40, 2000)
    ]
    text = [np.full(n, 5, dtype=np.int32) for n in rng.integers(30, 300, 500)]
    documents = [Document(f"d{i}", "test", tokens, ((1, len(tokens)),)) for i, tokens in enumerate([*vision, *text])]
    sequences = list(pack(documents, 512, VOCABULARY, "vision-text", window=3000))
    share = np.array([VOCABULARY["vision"].contains(sequence.tokens).mean() for sequence in sequences])
    assert 0.2 < share.mean() < 0.8
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.25


def test_neighbours_are_not_sorted_by_length() -> None:
    documents = numbered(text_mix(2, 2000, 1024).tolist())
    sequences = list(pack(documents, 1024, VOCABULARY, "text"))
    longest = np.array([max(part["length"] for part in s.lineage) for s in sequences])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.25
    several = [[part["length"] for part in s.lineage] for s in sequences if len(s.lineage) > 3]
    descending = sum(lengths == sorted(lengths, reverse=True) for lengths in several)
    assert descending < 0.2 * len(several)


def test_a_kind_of_document_that_comes_first_is_not_kept_for_last() -> None:
    """Short ones are taken in the order in which they come, whatever their length."""
    lengths = [40 + i % 7 if i % 2 else 90 + i % 11 for i in range(4000)]
    sequences = list(pack(numbered(lengths), 4096, VOCABULARY, "text", window=400))
    at = np.array([np.mean([int(part["key"][1:]) for part in s.lineage]) for s in sequences])
    assert np.abs(at - np.linspace(0, 4000, len(at))).max() < 400


def test_at_most_a_window_of_documents_is_read_ahead_of_what_has_come_out() -> None:
    taken = out = 0

    def counted() -> Iterator[Document]:
        nonlocal taken
        for document in numbered(text_mix(9, 3000, 512).tolist()):
            taken += 1
            yield document

    for sequence in pack_one_by_one(counted(), 512, window=200):
        assert taken - out <= 200
        out += sequence.n_examples
    assert taken == out == 3000


def test_a_window_is_full_at_so_many_tokens() -> None:
    taken = out = 0

    def counted() -> Iterator[Document]:
        nonlocal taken
        for document in numbered([30] * 500):
            taken += 30
            yield document

    for sequence in pack_one_by_one(counted(), 100, window_tokens=1500):
        assert taken - out <= 1500
        out += filled(sequence)
    assert out == 15_000


def test_packing_streams_window_by_window() -> None:
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield numbered([10])[0]

    stream = pack_one_by_one(endless(), 32, window=50)
    next(stream)
    assert taken == 50


def test_a_context_without_room_for_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="context 1"):
        list(pack([], 1, VOCABULARY, "text"))


def test_packing_runs_where_numba_may_write_nowhere(tmp_path: Path) -> None:
    """A package and a home that cannot be written: numba refuses to cache, packing compiles in memory instead."""
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    script = (
        "import numba.core.caching as c\n"
        "c.InTreeCacheLocator.ensure_cache_path = lambda self: (_ for _ in ()).throw(PermissionError('read-only'))\n"
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "import numpy as np\n"
        "from tokenization.packing.best_fit import best_fit\n"
        "assert best_fit(np.array([3, 5, 4]), 8)[1] == 2\n"
    )
    environment = {**os.environ, "HOME": str(occupied), "XDG_CACHE_HOME": str(occupied / "cache")}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no numba cache" in done.stderr
