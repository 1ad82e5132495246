"""Held-out loss and the unigram models beside it."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipelines.evaluate.table import cross_entropy, entropy
from pipelines.evaluate.tasks.heldout_loss import target_counts
from storage.store import Store
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.chosen_sequences import read_sequences
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(50, 20, 22)


def documents() -> list[Document]:
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate((30, 21, 9)):
        tokens = generator.integers(3, 50, length).astype(np.int32)
        tokens[length // 2 :] = VOCABULARY["vision"].codes_to_ids(generator.integers(0, 20, length - length // 2))
        made.append(Document(f"d{number}", "s", tokens, ((2, length),)))
    return made


def test_of_shards_in_an_object_store_only_the_chosen_sequences_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"memory://heldout-{tmp_path.name}")
    many = [Document(f"d{n}", "s", np.full(1000, 7, np.int32), ((2, 1000),)) for n in range(20)]
    sequences = list(pack(iter(many), 1000, VOCABULARY, "vision-text"))
    names, stats = ("0.tar", "1.tar"), []
    for number, name in enumerate(names):
        with store.writing(name) as file:
            stats.append(write_shard(file, sequences[number * 10 : number * 10 + 10], VOCABULARY))
    shards = ShardSet(1000, VOCABULARY, "vision-text", names, tuple(stats))
    memory, asked = type(fsspec.filesystem("memory")), []
    whole = memory.cat_file
    monkeypatch.setattr(
        memory, "cat_file", lambda fs, path, start, end: asked.append(end - start) or whole(fs, path, start, end)
    )
    read = list(read_sequences(store, shards, [1, 4, 15]))
    assert [one.key for one in read] == [sequences[number].key for number in (1, 4, 15)]
    np.testing.assert_array_equal(read[2].tokens, sequences[15].tokens)
    assert len(asked) == 3
    assert sum(asked) < 4 * (stats[0].bytes + stats[1].bytes) / 20


def test_targets_are_counted_by_id_only_where_they_carry_loss() -> None:
    counts = target_counts(pack(documents(), 40, VOCABULARY, "vision-text"), VOCABULARY)
    expected = np.bincount(np.concatenate([d.tokens[2:] for d in documents()]), minlength=VOCABULARY.size)
    np.testing.assert_array_equal(counts, expected)


def test_entropy_is_the_best_that_any_unigram_model_reaches() -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(0, 9, 40)
    tokens = np.repeat(np.arange(40), counts)
    frequencies = counts / counts.sum()
    assert entropy(counts) == pytest.approx(-np.log(frequencies[tokens]).mean())
    assert entropy(counts) < cross_entropy(counts, counts) < cross_entropy(counts, counts[::-1])
    assert cross_entropy(counts, counts * 10**9) == pytest.approx(entropy(counts), abs=1e-6)


def test_a_unigram_model_that_has_seen_nothing_is_uniform_over_the_modality() -> None:
    assert cross_entropy(np.array([0, 3, 1]), np.zeros(3)) == pytest.approx(np.log(3))
