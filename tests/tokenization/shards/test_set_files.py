"""Shard sets on disk: the same set again, its index mapped and shared by a node, and sets of earlier versions."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from storage.store import Store
from storage.urls import filesystem
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ENTRY, ShardSet, ShardStats
from tokenization.shards.keys import SerialKeys, compact_keys, keys_from_json, keys_to_json
from tokenization.shards.set_files import read_entries, read_set, write_entries, write_set
from tokenization.shards.shard import verify_shard, write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=100, codebook_size=40)
OLD = Store(str(Path(__file__).parents[2] / "data" / "shard_sets"))
NAME = "sets/books-train.json"


def shards(key_prefix: str = "books-train-00000-") -> Iterator[tuple[bytes, ShardStats]]:
    """Two shards of two sequences: those of which `index_in_json.json` is the set."""
    rng = np.random.default_rng(7)
    documents = []
    for number in range(12):
        tokens = rng.integers(0, VOCABULARY.eov_id + 1, rng.integers(2, 20)).astype(np.int32)
        documents.append(Document(f"d{number}", "books", tokens, ((1, 2 + number % 3),), {"n": number}))
    sequences = pack(documents, 32, VOCABULARY, "vision-text", key_prefix=key_prefix)
    for _ in range(2):
        file = io.BytesIO()
        stats = write_shard(file, itertools.islice(sequences, 2), VOCABULARY)
        yield file.getvalue(), stats


def a_set(key_prefix: str = "books-train-00000-") -> ShardSet:
    names = tuple(f"shards/books-train-00000-0000{number}.tar" for number in range(2))
    stats = tuple(stats for _, stats in shards(key_prefix))
    return ShardSet(32, VOCABULARY, "vision-text", names, stats)


def everything(shard_set: ShardSet) -> tuple:
    places = [shard_set.locate(number) for number in range(len(shard_set))]
    located = [(name, entry) for name, _, entry in places]
    plain = [stats.to_json() for stats in shard_set.stats]
    settings = (shard_set.context, shard_set.vocabulary, shard_set.objective, shard_set.names)
    return settings, plain, located, shard_set.totals(), shard_set.n_examples.tolist()


@pytest.mark.parametrize("key_prefix", ["books-train-00000-", "unusual/é "])
def test_a_set_is_read_as_it_was_written(tmp_path: Path, key_prefix: str) -> None:
    store, whole = Store(str(tmp_path)), a_set(key_prefix)
    totals = write_set(store, NAME, whole)
    again = read_set(store, NAME)
    assert everything(again) == everything(whole)
    assert totals == whole.totals()
    assert totals["n_shards"] == 2
    assert totals["n_examples"] == again.n_examples.sum() == sum(stats.n_examples for stats in whole.stats)
    assert len(again) == totals["n_sequences"] == 4
    assert again.locate(3)[2] == whole.stats[1].index[1]
    assert again.shard_of(np.arange(4)).tolist() == [0, 0, 1, 1]
    assert again.under("text/").names == tuple(f"text/{name}" for name in whole.names)
    with pytest.raises(IndexError):
        again.locate(4)


def test_the_index_is_mapped_and_takes_24_bytes_a_sequence_and_none_for_its_key(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_set(store, NAME, a_set())
    again = read_set(store, NAME)
    assert ENTRY.itemsize == 24
    assert (tmp_path / "sets" / "books-train.npy").stat().st_size <= 192 + 4 * 24  # with the header
    for stats in again.stats:
        assert np.shares_memory(stats.index.entries, again.entries)
        assert isinstance(stats.index.keys, SerialKeys)
    assert np.shares_memory(again.n_examples, again.entries)
    assert not again.entries.flags.owndata  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.load(tmp_path / "sets" / "books-train.npy"), again.entries)


def test_a_set_with_its_index_in_json_is_read_as_the_one_of_today() -> None:
    """The file is of the version before; these are the same shards."""
    old = read_set(OLD, "index_in_json.json")
    assert everything(old) == everything(a_set())
    for (body, _), stats in zip(shards(), old.stats):
        assert verify_shard(io.BytesIO(body), stats, VOCABULARY) == []


def test_a_set_of_when_there_were_text_and_vision_alone_is_read(tmp_path: Path) -> None:
    plain = json.loads(Path(OLD.path("index_in_json.json")).read_text())
    for counts in (plain["totals"], *plain["shards"]):
        counts |= {f"n_{name}": number for name, number in counts.pop("targets").items()}
    plain["shards"][0]["text_size"] = 100
    plain["vocabulary"] = {"text_size": 100, "codebook_size": 40, "vision_size": 256, "bos_id": 1, "eos_id": 2}
    store = Store(str(tmp_path))
    store.write_json(NAME, plain)
    assert everything(read_set(store, NAME)) == everything(a_set())


def test_those_of_a_node_who_ask_at_once_fetch_a_remote_set_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    write_set(store, NAME, a_set())
    hashes = store.hashes("sets")
    fetched: list[str] = []

    def slowly(fs: MemoryFileSystem, path: str, local: str, **options: object) -> None:
        fetched.append(path.rpartition("/")[2])
        time.sleep(0.05)
        Path(local).write_bytes(fs.cat_file(path))

    monkeypatch.setattr(MemoryFileSystem, "get_file", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_set(store, NAME, hashes[NAME]), range(8)))
    assert all(everything(one) == everything(a_set()) for one in found)
    assert fetched == ["books-train.json", "books-train.npy"]


def test_an_index_that_is_not_what_was_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    write_set(store, NAME, a_set())
    fs, path = filesystem(store.path("sets/books-train.npy"), {})
    fs.pipe_file(path, b"other bytes")
    with pytest.raises(UserError, match=r"books-train\.npy: its sha256 is .*delete the folder of the stage"):
        read_set(store, NAME)


@pytest.mark.parametrize("size", [None, 0, 100, 250])
def test_an_index_that_is_gone_or_cut_short_is_named(tmp_path: Path, size: int | None) -> None:
    store, index = Store(str(tmp_path)), tmp_path / "sets" / "books-train.npy"
    write_set(store, NAME, a_set())
    if size is None:
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(UserError, match=r"books-train\.npy: the index of a shard set cannot be read .*run again"):
        read_set(store, NAME)


@pytest.mark.parametrize(("given_count", "message"), [(3, "1 entries too many"), (6, "2 entries missing")])
def test_entries_are_as_many_as_the_sequences(tmp_path: Path, given_count: int, message: str) -> None:
    parts = [stats.index.entries for stats in a_set().stats]
    store = Store(str(tmp_path))
    write_entries(store, "index/a.npy", parts, 4)
    np.testing.assert_array_equal(read_entries(store, "index/a.npy"), np.concatenate(parts))
    with pytest.raises(ValueError, match=message):
        write_entries(store, "index/b.npy", parts, given_count)
    assert store.names("index") == ["index/a.npy"]


@given(
    st.lists(st.text(max_size=12), max_size=4)
    | st.builds(
        lambda prefix, first, count: [f"{prefix}{first + n:08d}" for n in range(count)],
        st.text(max_size=4) | st.just("p1"),
        st.integers(0, 10**8 + 2) | st.just(10**8 - 1),
        st.integers(0, 4),
    )
)
@settings(deadline=None, max_examples=60)
def test_keys_survive_being_made_compact_and_json(keys: list[str]) -> None:
    compact = compact_keys(keys)
    assert list(compact) == keys
    again = keys_from_json(json.loads(json.dumps(keys_to_json(compact))), len(keys))
    assert list(again) == keys
    assert type(again) is type(compact)
