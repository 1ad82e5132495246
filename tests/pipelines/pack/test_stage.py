"""Documents to shards: how work is cut, and that packing loses, repeats and reorders nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.pack.record import PackRecord
from pipelines.pack.run import PackJob, PackPartition, _documents, cut_pack_partitions
from pipelines.tokenize.record import TokenizedPartition, TokenizeRecord
from storage.store import Store
from testing.finished_stages import documents_of, only_output
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.document import Document, PackedSequence
from tokenization.shards.document_parquet import write_documents
from tokenization.shards.shard import read_sequence


def tokenized(
    name: str, tokens: int, source: str = "a", heldout: bool = False, documents: int = 1, content: str = "hash"
) -> TokenizedPartition:
    partition = f"{source}-{'heldout' if heldout else 'train'}-{name}-{content}"
    return TokenizedPartition(partition, source, heldout, f"{name}.parquet", documents, tokens, 0, f"{name} {content}")


FILES = [
    tokenized("1", 45),
    tokenized("2", 40),
    tokenized("held", 5, heldout=True),
    tokenized("3", 1),
    tokenized("empty", 0, documents=0),
    tokenized("huge", 900),
    tokenized("other", 7, source="b"),
    tokenized("unread", 7, source="c"),
]


def cut(files: list[TokenizedPartition], context: int = 128) -> list[PackPartition]:
    return cut_pack_partitions(files, ["b", "a"], {"context": context}, 100)


def test_partitions_hold_files_of_one_source_and_split_up_to_the_limit() -> None:
    parts = cut(FILES)
    assert {(part.source, part.split, part.files) for part in parts} == {
        ("a", "train", ("1.parquet", "2.parquet", "3.parquet")),
        ("a", "train", ("huge.parquet",)),
        ("a", "heldout", ("held.parquet",)),
        ("b", "train", ("other.parquet",)),
    }
    assert [(part.source, part.split) for part in parts] == [("a", "train")] * 2 + [("a", "heldout"), ("b", "train")]
    many = [tokenized(str(number), 9) for number in range(100)]
    grouped = [part.files for part in cut(many)]
    assert sorted(name for files in grouped for name in files) == sorted(one.file for one in many)
    assert max(map(len, grouped)) <= 11
    assert len(grouped) < 25
    changed = [tokenized(str(number), 9, content=f"new {number}") for number in range(100)]
    assert [part.files for part in cut(changed)] == grouped, "what is in them does not decide which are together"


def test_a_partition_is_named_by_its_documents_and_settings() -> None:
    def names(parts: list[PackPartition]) -> dict[tuple[str, ...], str]:
        assert len({part.name for part in parts}) == len(parts)
        assert all(re.fullmatch(rf"{part.source}-{part.split}-\w+-[0-9a-f]{{16}}", part.name) for part in parts)
        return {part.files: part.name for part in parts}

    first = names(cut(FILES))
    assert names(cut(FILES)) == first
    assert not first.items() & names(cut(FILES, context=256)).items()
    changed = names(cut([tokenized("1", 45, content="another"), *FILES[1:]]))
    assert changed.keys() == first.keys()
    assert {files for files in first if changed[files] != first[files]} == {("1.parquet", "2.parquet", "3.parquet")}
    fewer = names(cut(FILES[1:]))
    assert fewer.keys() - first.keys() == {("2.parquet", "3.parquet")}
    assert len(fewer.items() & first.items()) == 3


@pytest.mark.parametrize(
    ("least", "most", "chosen"),
    [
        (0, None, [2, 9, 10, 11, 19, 20, 21, 400]),
        (10, 20, [10, 11, 19, 20]),
        (21, None, [21, 400]),
        (0, 9, [2, 9]),
        (20, 20, [20]),
        (11, 18, [11]),
        (401, None, []),
    ],
)
def test_a_length_bucket_holds_exactly_the_documents_from_its_least_to_its_most_tokens(
    tmp_path: Path, least: int, most: int | None, chosen: list[int]
) -> None:
    """Whole documents count, before they are split at the context: those of 400 tokens are over it here."""
    store = Store(str(tmp_path))
    lengths = [2, 9, 10, 11, 19, 20, 21, 400]
    with store.writing("documents/a.parquet") as file:
        write_documents(file, (Document(f"d{n}", "acts", np.full(n, 5, np.int32), ((1, n),)) for n in lengths))
    recipe = tiny_recipe(tmp_path)
    bucket = {"min_document_tokens": least, "max_document_tokens": most}
    job = PackJob(recipe.pack, recipe.train.stages[0].model_copy(update=bucket), VOCABULARY, recipe.seed)
    assert job.stage.context < 400
    part = PackPartition("acts-train-00000", "acts", "train", ("documents/a.parquet",))
    batches = _documents(part, job, store)
    assert [len(tokens) for batch in batches for tokens in batch.column("tokens")] == chosen


def sequences(root: Path, stage: str, source: str, split: str) -> list[PackedSequence]:
    output = only_output(root, f"pack-{stage}", PackRecord)
    shard_set = output.record.read_set(output.shared, source, split)
    assert shard_set is not None
    made = []
    for number in range(len(shard_set)):
        shard, _, entry = shard_set.locate(number)
        with output.shared.open(shard) as file:
            made.append(read_sequence(file, entry))
    return made


def originals(root: Path) -> dict[str, np.ndarray]:
    return {key: one.tokens for key, one in documents_of(only_output(root, "tokenize", TokenizeRecord)).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "source", "split"),
    [("text", "acts", "train"), ("text", "acts", "heldout"), ("video", "acts", "train"), ("video", "clips", "train")],
)
def test_the_pieces_of_every_document_put_in_order_are_the_document(
    undisturbed: Path, stage: str, source: str, split: str
) -> None:
    pieces: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for sequence in sequences(undisturbed, stage, source, split):
        bounds = sequence.cu_seqlens
        assert len(sequence.lineage) in (len(bounds) - 1, len(bounds) - 2), "the rest of a sequence is padding"
        for entry, start, end in zip(sequence.lineage, bounds, bounds[1:]):
            key, _, at = entry["key"].partition("@")
            pieces[key].append((int(at or 0), sequence.tokens[start:end]))
            assert end - start == entry["length"]
    whole = originals(undisturbed)
    context = len(sequence.tokens)
    heldout = {"acts/acts/held.md#0"} if source == "acts" else {key for key in whole if "/held.mp4" in key}
    of_split = {key for key in whole if key.startswith(f"{source}/") and (key in heldout) == (split == "heldout")}
    assert set(pieces) == of_split
    for key, parts in pieces.items():
        starts, tokens = zip(*sorted(parts, key=lambda part: part[0]))
        assert list(starts) == list(np.cumsum([0, *map(len, tokens)])[:-1])
        left = len(whole[key]) % context if len(whole[key]) > context else 0
        end = len(whole[key]) - (left == 1)  # a last piece of one token has no target and is left out
        np.testing.assert_array_equal(np.concatenate(tokens), whole[key][:end])


@pytest.mark.slow
def test_documents_longer_than_the_context_are_counted_as_split(undisturbed: Path) -> None:
    figures = only_output(undisturbed, "pack-text", PackRecord).record.figures
    longer = [tokens for key, tokens in originals(undisturbed).items() if key.startswith("acts/") and len(tokens) > 128]
    assert figures.split_documents == len(longer) == 9
