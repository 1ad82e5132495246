"""Reading by ranges: exactly what is asked for, through cuts and refusals of a real S3 server, or one clear error."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pytest

from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from storage.remote_file import ObjectRanges, RangedFile, ReadAheadFile
from storage.retry import Backoff
from storage.store import Store
from storage.urls import open_ranged
from testing.faulty_proxy import Faults
from testing.s3_server import KEY, SECRET, ObjectStore
from tokenization.document import Document
from tokenization.loader.loader import Loader
from tokenization.loader.order import SequenceOrder
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

BODY = np.random.default_rng(0).bytes(3 * 2**20)
VOCABULARY = JointVocabulary.for_codebook(text_size=100, codebook_size=40)
ONE_ATTEMPT = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture
def in_memory() -> str:
    fsspec.filesystem("memory").pipe_file("/ranged/object", BODY)
    return "memory://ranged/object"


def test_a_file_gives_what_is_at_its_offsets(in_memory: str) -> None:
    file = open_ranged(in_memory)
    assert file.seek(1000) == 1000
    assert file.read(2000) == BODY[1000:3000]
    assert file.read(10) == BODY[3000:3010]
    assert file.tell() == 3010
    assert file.seek(-5, io.SEEK_CUR) == 3005
    assert file.seek(-7, io.SEEK_END) == len(BODY) - 7
    assert file.read(100) == BODY[-7:], "short where the object ends"
    assert file.read(100) == b""
    file.seek(0)
    assert file.read() == BODY


def test_an_object_that_is_not_there_is_named_at_once(in_memory: str) -> None:
    with pytest.raises(FileNotFoundError, match="memory://ranged/none"):
        open_ranged("memory://ranged/none").read(1)


@pytest.fixture(scope="module")
def faults(object_store: ObjectStore) -> Faults:
    object_store.fs.pipe_file("data/ranged.tar", BODY)
    return Faults.before(object_store.endpoint)


def through(
    proxy: Faults, faults: list[int | str], always: int | None = None, name: str = "ranged.tar", secret: str = SECRET
) -> RangedFile:
    proxy.faults[:], proxy.always, proxy.ranges[:] = faults, always, []
    options = {"endpoint_url": proxy.endpoint, "key": KEY, "secret": secret, **ONE_ATTEMPT}
    return open_ranged(f"s3://data/{name}", options, Backoff(attempts=3, pause=0.01))


@pytest.mark.slow
def test_a_read_is_one_request_for_its_bytes_and_no_more(faults: Faults) -> None:
    file = through(faults, [])
    file.seek(5000)
    assert file.read(262144) == BODY[5000:267144]
    assert faults.ranges == ["5000-267143"]


@pytest.mark.slow
def test_a_connection_cut_mid_body_goes_on_at_the_byte_where_it_stopped(faults: Faults) -> None:
    file = through(faults, ["cut:700000", "cut:100", "cut:0", "cut:1000000"])
    file.seek(100)
    assert file.read(2_500_000) == BODY[100:2_500_100]
    starts = [int(asked.split("-")[0]) for asked in faults.ranges]
    assert starts == [100, 700_100, 700_200, 700_200, 1_700_200]
    assert {asked.split("-")[1] for asked in faults.ranges} == {"2500099"}


@pytest.mark.slow
def test_refusals_are_waited_out(faults: Faults) -> None:
    file = through(faults, [503, 500, "cut:10", 503, 429])
    assert file.read(1000) == BODY[:1000]
    assert len(faults.ranges) == 6


@pytest.mark.slow
def test_refusals_without_end_are_one_sentence_that_names_object_and_store(faults: Faults) -> None:
    file = through(faults, [], always=503)
    with pytest.raises(UserError, match=r"^s3://data/ranged\.tar: cannot be read in 3 attempts") as caught:
        file.read(1000)
    assert faults.endpoint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(faults.ranges) == 3


@pytest.mark.slow
def test_what_repeating_does_not_mend_is_not_repeated(faults: Faults) -> None:
    with pytest.raises(UserError, match=r"^s3://data/ranged\.tar: cannot be read from the store at"):
        through(faults, [], secret="wrong").read(1000)
    assert len(faults.ranges) == 1
    with pytest.raises(FileNotFoundError, match=r"s3://data/none\.tar"):
        through(faults, [], name="none.tar").read(1000)
    assert len(faults.ranges) == 1


@pytest.mark.slow
def test_reading_past_the_end_of_an_object_in_a_bucket_gives_nothing(faults: Faults) -> None:
    file = through(faults, [])
    file.seek(-10, io.SEEK_END)
    assert file.read(100) == BODY[-10:]
    assert file.read(100) == b""


@pytest.mark.slow
def test_a_server_that_nobody_runs_is_named(faults: Faults) -> None:
    options = {"endpoint_url": "http://127.0.0.1:9", "key": KEY, "secret": SECRET, **ONE_ATTEMPT}
    with pytest.raises(UserError, match=r"^s3://data/a\.tar: cannot be read in 2 attempts .* http://127\.0\.0\.1:9 "):
        open_ranged("s3://data/a.tar", options, Backoff(attempts=2, pause=0.01)).read(1)


@pytest.mark.slow
def test_a_loader_reads_the_same_sequences_through_a_failing_store(
    faults: Faults, object_store: ObjectStore, tmp_path: Path
) -> None:
    documents = (Document(f"d{n}", "d", np.full(900, 7, np.int32), ((1, 900),)) for n in itertools.count())
    sequences = pack(documents, 1024, VOCABULARY, "text", window=100, key_prefix="d")
    faults.faults[:], faults.always = [], None
    options = {"endpoint_url": faults.endpoint, "key": KEY, "secret": SECRET, **ONE_ATTEMPT}
    local, remote = Store(str(tmp_path)), Store("s3://data/loader", options)
    names, stats = ["0.tar", "1.tar", "2.tar"], []
    for name in names:
        with local.writing(name) as file:
            stats.append(write_shard(file, itertools.islice(sequences, 8), VOCABULARY))
        object_store.fs.put_file(local.path(name), f"data/loader/{name}")
    shards = ShardSet(1024, VOCABULARY, "text", tuple(names), tuple(stats))

    def read(store: Store, steps: int, **reading: int) -> list[tuple[str, bytes]]:
        batches = iter(Loader(store.open_ranged, [shards], SequenceOrder(1, (24,)), 4, grad_accum=4, **reading))
        parts = [part for batch, _ in itertools.islice(batches, steps) for part in batch.micro_batches]
        batches.close()  # type: ignore[attr-defined]  # a generator
        return [(part.keys[0], part.tokens.tobytes()) for part in parts]

    expected = read(local, 8)
    faults.ranges.clear()
    assert read(remote, 8, prefetch=0) == expected
    assert len(faults.ranges) == 32, "one request a sequence"
    faults.faults[:] = [503, "cut:4000", None, "cut:0", None, 500]
    assert read(remote, 8, workers=2) == expected

    body = bytearray(Path(local.path("1.tar")).read_bytes())
    body[700::512] = bytes(len(body[700::512]))
    object_store.fs.pipe_file("data/loader/1.tar", bytes(body))
    with pytest.raises(BadData, match=r"^shard 1\.tar: sequence .* is corrupt: .*; the shard's sha256 is"):
        read(remote, 8, workers=2)


class AwayWhileReadAhead:
    """The bytes of an object whose store answers no request that is made ahead."""

    def first(self, n_bytes: int) -> tuple[int, str | None, list[bytes]]:
        return len(BODY), None, [BODY[:n_bytes]]

    def pieces(self, start: int, end: int, *_: Any) -> Iterator[bytes]:
        yield BODY[start:end]

    def once(self) -> AwayWhileReadAhead:
        return Away()


class Away(AwayWhileReadAhead):
    def pieces(self, start: int, end: int, *_: Any) -> Iterator[bytes]:
        if start < end:
            raise StoreError("x: cannot be read", "transient")
        return iter(())


def test_a_block_that_could_not_be_read_ahead_is_requested_again_when_it_is_wanted() -> None:
    assert ReadAheadFile(cast(ObjectRanges, AwayWhileReadAhead())).read() == BODY


def test_a_file_that_could_not_be_opened_can_be_closed() -> None:
    class Absent(AwayWhileReadAhead):
        def first(self, n_bytes: int) -> tuple[int, str | None, list[bytes]]:
            raise FileNotFoundError

    file = ReadAheadFile.__new__(ReadAheadFile)
    with pytest.raises(FileNotFoundError):
        file.__init__(cast(ObjectRanges, Absent()))  # type: ignore[misc]
    file.close()
