"""Packing in columns gives what its definition gives, document by document, in the same bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.document import Document, PackedSequence
from tokenization.packing.examples import pieces
from tokenization.packing.loss_weights import objective_modalities
from tokenization.packing.pack import KEPT, pack, pack_batches, pack_window
from tokenization.permutation import derive_key, permute
from tokenization.shards.document_parquet import read_batches, to_batch, write_documents
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=50, codebook_size=20).extended("audio", 30)
JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
PROVENANCE = st.dictionaries(
    st.sampled_from(["url", "a", "document_rang", "document_ranges", "zulu", "é", "frame_times"]),
    JSON_VALUES | st.lists(JSON_VALUES, max_size=3) | st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=2),
)


@st.composite
def any_documents(draw: st.DrawFn, objective: str) -> list[Document]:
    names = objective_modalities(objective)
    ids = [i for one in VOCABULARY.modalities if one.name in names for i in range(one.start, one.start + 20)]
    made = []
    for number in range(draw(st.integers(0, 14))):
        length = draw(st.integers(0, 60))
        tokens = np.random.default_rng(draw(st.integers(0, 99))).choice(ids, length).astype(np.int32)
        edges = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        spans = tuple(zip(edges[::2], edges[1::2]))
        key = draw(st.text(max_size=4) | st.just("plain-key/x.y#3"))
        made.append(Document(f"{key}{number}", draw(st.sampled_from(["s", 'q"é'])), tokens, spans, draw(PROVENANCE)))
    return made


def split(document: Document, context: int) -> list[Document]:
    """The document, or its pieces as the docstring of `pack_batches` has them."""
    if len(document) <= context:
        return [document]
    found = []
    for start in range(0, len(document), context):
        end = min(start + context, len(document))
        spans = ((max(low - start, 1), min(high, end) - start) for low, high in document.loss_spans)
        provenance = {**document.provenance, "document_range": [start, end]}
        tokens, spans = document.tokens[start:end], tuple((low, high) for low, high in spans if low < high)
        found.append(
            replace(document, key=f"{document.key}@{start}", tokens=tokens, loss_spans=spans, provenance=provenance)
        )
    return found


def weights_of(document: Document, objective: str) -> np.ndarray:
    """1 / (M T) for each of the T targets of one of M modalities."""
    target = document.loss_mask
    target[:1] = False
    weights = np.zeros(len(document), np.float32)
    for name in objective_modalities(objective):
        of_it = target & VOCABULARY[name].contains(document.tokens)
        if of_it.any():
            weights[of_it] = 1 / len(objective_modalities(objective)) / np.count_nonzero(of_it)
    return weights


def by_definition(
    documents: Iterable[Document], context: int, objective: str, window: int, window_tokens: int, seed: int
) -> Iterator[PackedSequence]:
    """Packed sequences from objects, a window at a time."""
    examples = [piece for one in documents for piece in split(one, context) if len(piece) >= 2]
    members: list[Document] = []
    made = number = 0
    while examples or members or not number:
        while examples and len(members) < window and sum(map(len, members)) < window_tokens:
            members.append(examples.pop(0))
        is_full = len(members) >= window or sum(map(len, members)) >= window_tokens
        keep = (window // KEPT, window_tokens // KEPT) if is_full else (0, 0)
        sequence_of, n = pack_window(np.array([len(one) for one in members], np.int64), context, *keep)
        key = derive_key(seed, number)
        sequence_order = permute(np.arange(n), n, derive_key(0) ^ key)
        member_order = permute(np.arange(len(members)), len(members), derive_key(1) ^ key)
        for chosen in np.argsort(sequence_order):
            group = sorted(np.flatnonzero(sequence_of == chosen), key=member_order.__getitem__)
            if group:
                yield joined(f"p-{made:08d}", [members[i] for i in group], context, objective)
                made += 1
        members = [members[i] for i in np.flatnonzero(sequence_of < 0)]
        number += 1
        if not is_full:
            return


def joined(key: str, group: list[Document], context: int, objective: str) -> PackedSequence:
    boundaries = np.cumsum([0, *map(len, group)], dtype=np.int32)
    room = np.zeros(context - boundaries[-1], np.int32)
    tokens = np.concatenate([*(one.tokens for one in group), room])
    weight = np.concatenate([*(weights_of(one, objective) for one in group), room.astype(np.float32)])
    if len(room):
        boundaries = np.append(boundaries, np.int32(context))
    lineage = tuple(
        {"key": one.key, "source": one.source, "length": len(one), "provenance": dict(one.provenance)} for one in group
    )
    return PackedSequence(key, tokens, boundaries, weight, len(group), lineage)


def shard_of(sequences: Iterable[PackedSequence]) -> tuple[bytes, dict]:
    file = io.BytesIO()
    stats = write_shard(file, sequences, VOCABULARY)
    return file.getvalue(), stats.to_json()


@given(st.data(), st.sampled_from(["text", "vision-text", "audio-vision-text"]))
@settings(deadline=None, max_examples=80)
def test_shards_packed_in_columns_are_those_of_the_definition(data: st.DataObject, objective: str) -> None:
    documents = data.draw(any_documents(objective))
    context, window = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 9))
    limits = {"window": window, "window_tokens": data.draw(st.integers(1, 200)), "seed": data.draw(st.integers(0, 3))}
    cuts = sorted(data.draw(st.sets(st.integers(1, 13), max_size=3)))
    parts = [part for part in (documents[low:high] for low, high in zip([0, *cuts], [*cuts, None])) if part]
    packed = pack_batches(map(to_batch, parts), context, VOCABULARY, objective, key_prefix="p-", **limits)
    assert shard_of(packed) == shard_of(by_definition(documents, context, objective, **limits))


def test_a_batch_that_is_part_of_another_is_packed_as_itself() -> None:
    rng = np.random.default_rng(0)
    documents = [
        Document(f"d{n}", "s", rng.integers(0, 50, 7 + n).astype(np.int32), ((n, n + 3),), {"n": n}) for n in range(9)
    ]
    whole = to_batch(documents)
    for part, own in ((whole[3:7], documents[3:7]), (whole.filter(pa.array([True, False, True] * 3)), None)):
        chosen = own or [one for n, one in enumerate(documents) if n % 3 != 1]
        found = shard_of(pack_batches([part], 12, VOCABULARY, "text"))
        assert found == shard_of(pack(chosen, 12, VOCABULARY, "text"))


def test_documents_are_packed_as_they_are_read_from_a_file() -> None:
    documents = [Document(f"k/{n}é", "s", np.arange(3, 40, dtype=np.int32), ((1, 37),), {"n": [n]}) for n in range(20)]
    file = io.BytesIO()
    write_documents(file, documents, row_group_tokens=100)
    assert shard_of(pack_batches(read_batches(file), 30, VOCABULARY, "text")) == shard_of(
        pack(documents, 30, VOCABULARY, "text")
    )


def test_a_document_over_the_context_is_split_with_its_spans() -> None:
    document = Document("book", "test", np.arange(3, 13, dtype=np.int32), ((1, 3), (4, 9)), {"url": "u"})
    found = {
        part["key"]: (part["provenance"], np.flatnonzero(sequence.loss_weight).tolist())
        for sequence in pack([document], 4, VOCABULARY, "text")
        for part in sequence.lineage
    }
    assert found == {
        "book@0": ({"url": "u", "document_range": [0, 4]}, [1, 2]),
        "book@4": ({"url": "u", "document_range": [4, 8]}, [1, 2, 3]),
        "book@8": ({"url": "u", "document_range": [8, 10]}, []),
    }


@pytest.mark.parametrize(
    ("length", "ranges"), [(0, [(0, 0)]), (4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)])]
)
def test_pieces_are_in_order_and_a_document_that_fits_is_one(length: int, ranges: list[tuple[int, int]]) -> None:
    row, start, end = pieces(np.array([3, length]), 4)
    assert list(zip(start.tolist(), end.tolist())) == [(0, 3), *ranges]
    assert row.tolist() == [0, *[1] * len(ranges)]


def test_a_lineage_is_parsed_when_it_is_asked_for() -> None:
    (sequence,) = pack([Document('k"é', "s", np.array([1, 5], np.int32), ((1, 2),), {"n": 1})], 4, VOCABULARY, "text")
    assert len(sequence.lineage) == 1
    assert list(sequence.lineage) == [{"key": 'k"é', "length": 2, "provenance": {"n": 1}, "source": "s"}]
    assert json.loads(sequence.lineage.json) == list(sequence.lineage)  # type: ignore[attr-defined]
