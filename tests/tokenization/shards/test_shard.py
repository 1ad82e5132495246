"""Shards: the same bytes every time, readable by webdataset and by offset, and damage is found and named."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadData, UserError
from tokenization.document import Document, PackedSequence
from tokenization.packing.pack import filled, pack
from tokenization.shards.index import BLOCK, ShardIndex, ShardSet, ShardStats
from tokenization.shards.shard import member_name, read_sequence, verify_shard, write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=100, codebook_size=40)


def some_sequences(n: int = 20, prefix: str = "t-", context: int = 64) -> list[PackedSequence]:
    rng = np.random.default_rng(n)
    documents = []
    for number in range(n):
        tokens = rng.integers(0, VOCABULARY.eov_id + 1, rng.integers(2, 90)).astype(np.int32)
        documents.append(Document(f"clips/a.{number}.mp4", "clips", tokens, ((1, len(tokens)),), {"url": "s3://b/é"}))
    return list(pack(documents, context, VOCABULARY, "vision-text", key_prefix=prefix))


def shard_of(sequences: list[PackedSequence]) -> tuple[bytes, ShardStats]:
    file = io.BytesIO()
    stats = write_shard(file, sequences, VOCABULARY)
    return file.getvalue(), stats


def same(one: PackedSequence, other: PackedSequence) -> bool:
    arrays = ("tokens", "cu_seqlens", "loss_weight")
    return (one.key, one.n_examples, list(one.lineage)) == (other.key, other.n_examples, list(other.lineage)) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in arrays
    )


def test_two_writes_are_byte_identical_and_hashed_as_written() -> None:
    (first, stats), (second, again) = shard_of(some_sequences()), shard_of(some_sequences())
    assert first == second
    assert stats.to_json() == again.to_json()
    assert stats.sha256 == hashlib.sha256(first).hexdigest()
    assert stats.bytes == len(first)


def test_headers_hold_nothing_of_the_machine_or_the_moment() -> None:
    body, _ = shard_of(some_sequences())
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.type, member.pax_headers) == (0o644, tarfile.REGTYPE, {})
    assert body[257:263] == b"ustar\x00"


def test_a_shard_streams_into_a_file_that_cannot_seek() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.parts: list[bytes] = []

        def write(self, data: bytes) -> None:
            self.parts.append(bytes(data))

    pipe = Pipe()
    taken = 0

    def watched():
        nonlocal taken
        for sequence in some_sequences():
            yield sequence
            taken += 1
            assert len(b"".join(pipe.parts)) >= taken * 64 * 4, "a sequence is written before the next is asked for"

    stats = write_shard(pipe, watched(), VOCABULARY)
    assert hashlib.sha256(b"".join(pipe.parts)).hexdigest() == stats.sha256


def test_every_sequence_is_read_back_by_its_offset_in_any_order() -> None:
    sequences = some_sequences()
    body, stats = shard_of(sequences)
    file = io.BytesIO(body)
    for number in reversed(range(len(sequences))):
        assert same(read_sequence(file, stats.index[number]), sequences[number])


def test_a_file_that_reads_in_dribs_is_read_whole() -> None:
    class Dribbling(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size, 100) if size and size > 0 else size)

    sequences = some_sequences()
    body, stats = shard_of(sequences)
    assert same(read_sequence(Dribbling(body), stats.index[3]), sequences[3])


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    sequences = some_sequences()
    path = tmp_path / "shard.tar"
    with path.open("wb") as file:
        write_shard(file, sequences, VOCABULARY)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [member_name(sequence.key) for sequence in sequences]
    for sample, sequence in zip(samples, sequences):
        arrays = safetensors.numpy.load(sample["safetensors"])
        assert np.array_equal(arrays["tokens"], sequence.tokens)
        assert json.loads(sample["json"])["key"] == sequence.key


def test_counts_are_those_of_the_sequences() -> None:
    sequences = some_sequences()
    _, stats = shard_of(sequences)
    tokens = np.concatenate([sequence.tokens for sequence in sequences])
    target = np.concatenate([sequence.loss_weight for sequence in sequences]) > 0
    assert stats.context == 64
    assert stats.n_sequences == len(stats.index) == len(sequences)
    assert stats.n_tokens == len(tokens)
    assert stats.n_filled == sum(map(filled, sequences))
    assert stats.targets["vision"] == (target & (tokens >= 100)).sum() > 0
    assert stats.targets["text"] == (target & (tokens < 100)).sum() > 0
    assert stats.n_examples == sum(sequence.n_examples for sequence in sequences) > 20
    assert stats.n_documents == 20, "pieces of one document count once"


def test_an_empty_shard_is_a_valid_one() -> None:
    body, stats = shard_of([])
    assert stats.n_sequences == 0
    assert verify_shard(io.BytesIO(body), stats, VOCABULARY) == []


@given(st.text(min_size=0, max_size=120))
@settings(deadline=None)
def test_member_names_are_safe_and_split_where_webdataset_should(key: str) -> None:
    name = f"{member_name(key)}.safetensors"
    assert webdataset.tariterators.base_plus_ext(name) == (member_name(key), "safetensors")
    assert name.isascii()
    assert "/" not in name
    assert len(name) <= 100, "a longer name would leave plain ustar"
    assert not name.startswith("_"), "webdataset takes __name__ for metadata"


def test_names_made_safe_stay_apart() -> None:
    keys = ["a/b", "a.b", "a b", "a_b", "../a", "__a__", "x" * 200, "x" * 201, ""]
    assert len({member_name(key) for key in keys}) == len(keys)
    assert member_name("text-32k-00000001") == "text-32k-00000001"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(64, np.int64)}, "tokens is int64, not int32"),
        ({"tokens": np.zeros(63, np.int32)}, "63 tokens"),
        ({"cu_seqlens": np.array([0, 64, 64], np.int32)}, "does not rise from 0 to 64"),
        ({"cu_seqlens": np.array([0, 60], np.int32)}, "does not rise from 0 to 64"),
        ({"n_examples": 40}, "40 examples in"),
        ({"loss_weight": np.ones(64, np.float32)}, "loss on the first token"),
        ({"lineage": ()}, "lineage of 0 documents"),
    ],
)
def test_a_malformed_sequence_is_refused(change: dict, message: str) -> None:
    first, second, *_ = some_sequences()
    with pytest.raises(ValueError, match=message) as caught:
        shard_of([first, replace(second, **change)])
    assert second.key in str(caught.value)


def test_a_key_twice_in_a_shard_is_refused() -> None:
    first, *_ = some_sequences()
    with pytest.raises(ValueError, match="already in this shard"):
        shard_of([first, first])


def test_a_whole_shard_verifies() -> None:
    body, stats = shard_of(some_sequences())
    assert verify_shard(io.BytesIO(body), stats, VOCABULARY) == []


def test_a_flipped_bit_is_found_by_verification_and_by_reading() -> None:
    body, stats = shard_of(some_sequences())
    entry = stats.index[2]
    damaged = bytearray(body)
    damaged[entry.offset + entry.length - 1] ^= 1
    problems = verify_shard(io.BytesIO(damaged), stats, VOCABULARY)
    assert any("sha256" in problem for problem in problems)
    assert any(entry.key in problem and "checksum" in problem for problem in problems)
    with pytest.raises(BadData, match=f"sequence {entry.key} is corrupt"):
        read_sequence(io.BytesIO(damaged), entry)


def test_damaged_lineage_is_named() -> None:
    body, stats = shard_of(some_sequences())
    entry = stats.index[2]
    damaged = bytearray(body)
    damaged[entry.json_offset] = 0
    with pytest.raises(BadData, match=f"sequence {entry.key} is corrupt"):
        read_sequence(io.BytesIO(damaged), entry)


def test_a_truncated_shard_is_found() -> None:
    body, stats = shard_of(some_sequences())
    entry = stats.index[len(stats.index) - 1]
    problems = verify_shard(io.BytesIO(body[: entry.offset + 10]), stats, VOCABULARY)
    assert any("bytes, the manifest says" in problem for problem in problems)
    assert any(f"sequence {entry.key} is cut short" in problem for problem in problems)


class OnlyForward(io.BytesIO):
    """A file that is read once."""

    def seek(self, offset: int, whence: int = 0) -> int:
        assert (offset, whence, self.tell()) == (0, 0, 0)
        return 0


def test_verification_reads_a_shard_once_from_its_beginning_to_its_end() -> None:
    body, stats = shard_of(some_sequences())
    assert verify_shard(OnlyForward(body), stats, VOCABULARY) == []


def test_every_damaged_member_is_named() -> None:
    body, stats = shard_of(some_sequences())
    damaged = bytearray(body)
    for number, place in ((1, -BLOCK), (3, 100), (4, stats.index[4].json_offset - stats.index[4].offset - BLOCK)):
        damaged[stats.index[number].offset + place] ^= 1
    problems = verify_shard(io.BytesIO(damaged), stats, VOCABULARY)
    assert len(problems) == 4
    assert "sha256" in problems[0]
    for number, problem in zip((1, 3, 4), problems[1:]):
        assert stats.index[number].key in problem


def test_bytes_after_the_last_member_are_found() -> None:
    body, stats = shard_of(some_sequences())
    assert len(verify_shard(io.BytesIO(body + b"more"), stats, VOCABULARY)) == 2


def test_counts_and_index_that_do_not_match_the_shard_are_found() -> None:
    body, stats = shard_of(some_sequences())
    fewer = replace(stats, targets={**stats.targets, "text": 0})
    assert verify_shard(io.BytesIO(body), fewer, VOCABULARY) == [
        f"the number of text targets is {stats.targets['text']}, the manifest says 0"
    ]
    entries = stats.index.entries.copy()
    entries["offset"] = entries["offset"][::-1]
    wrong = replace(stats, index=ShardIndex(stats.index.keys, entries))
    assert any("in the index" in problem for problem in verify_shard(io.BytesIO(body), wrong, VOCABULARY))


def test_a_shard_of_another_context_does_not_join_a_set() -> None:
    _, stats = shard_of(some_sequences())
    with pytest.raises(UserError, match=r"shard a\.tar has context 64, not 128"):
        ShardSet(128, VOCABULARY, "vision-text", ("a.tar",), (stats,))
