"""Verification reads every file once, several at a time, and names each that is not as it was committed."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from pipelines.dag.manifest import MANIFEST, Declaration, Manifest, PlainRecord
from pipelines.dag.partitions import record_name
from pipelines.inspect import verify as verification
from pipelines.inspect.verify import verify
from storage.store import Store
from testing.tiny_run import VOCABULARY
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

SHARDS = 12


@pytest.fixture
def stage(tmp_path: Path) -> Store:
    """A stage's folder with files, partitions and a set of shards."""
    store = Store(str(tmp_path / "stage"))
    names, stats = [], []
    for number in range(SHARDS):
        documents = [Document(f"d{n}", "a", np.full(40 + n, 5, np.int32), ((1, 40 + n),)) for n in range(20)]
        names.append(f"shards/{number:05d}.tar")
        with store.writing(names[-1]) as file:
            made = pack(documents, 128, VOCABULARY, "text", key_prefix=f"s{number}-")
            stats.append(write_shard(file, made, VOCABULARY))
    write_set(store, "sets/a-train.json", ShardSet(128, VOCABULARY, "text", tuple(names), tuple(stats)))
    for number in range(4):
        store.write_json(f"documents/{number}.json", number)
        store.write_json(record_name(str(number)), {})
    outputs: dict[str, Any] = {
        "files": store.hashes("sets"),
        "partitions": [
            {"partition": str(n), "file": f"documents/{n}.json", "sha256": store.sha256(f"documents/{n}.json")}
            for n in range(4)
        ],
        "sets": {"a": {"train": {"file": "sets/a-train.json"}}},
    }
    declaration = Declaration("pack-a", "pack", {}, 1, {})
    manifest = Manifest(declaration, PlainRecord(outputs), fingerprint=declaration.fingerprint)
    store.write_json(MANIFEST, manifest.to_json())
    return store


def damage(store: Store, name: str) -> None:
    path = Path(store.path(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 5])
def test_every_file_that_is_not_as_it_was_committed_is_named_in_order(stage: Store, threads: int) -> None:
    assert verify(stage.url, threads) == []
    for name in ("shards/00003.tar", "shards/00007.tar", "documents/1.json"):
        damage(stage, name)
    stage.delete("shards/00011.tar")
    stage.delete(record_name("2"))
    found = verify(stage.url, threads)
    named = dict.fromkeys(problem.partition(": ")[0] for problem in found)
    assert list(named) == [
        "documents/1.json",
        record_name("2"),
        "shards/00003.tar",
        "shards/00007.tar",
        "shards/00011.tar",
    ]
    assert [problem for problem in found if problem.endswith(": missing")] == [
        f"{record_name('2')}: missing",
        "shards/00011.tar: missing",
    ]


@pytest.mark.parametrize("name", ["sets/a-train.json", "sets/a-train.npy"])
def test_a_damaged_index_is_named_and_its_shards_are_not_judged_by_it(stage: Store, name: str) -> None:
    damage(stage, name)
    (problem,) = verify(stage.url)
    assert problem.startswith(f"{name}: sha256 is ")


def test_a_file_that_the_disk_does_not_give_is_named(stage: Store) -> None:
    Path(stage.path("documents/3.json")).unlink()
    Path(stage.path("documents/3.json")).mkdir()
    (problem,) = verify(stage.url)
    assert problem.startswith("documents/3.json: cannot be read")


def test_a_checkpoint_without_its_commit_is_named_but_an_emptied_folder_is_none(stage: Store) -> None:
    Path(stage.path("checkpoints/step-00000003")).mkdir(parents=True)
    assert verify(stage.url) == []
    stage.write_json("checkpoints/step-00000006/rank-0.json", 0)
    assert verify(stage.url) == ["checkpoints/step-00000006/COMMIT: missing"]


def test_files_are_read_side_by_side_one_a_thread_and_once(stage: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three wait for each other: they can only be open together; a fourth never is."""
    opened: Counter[str] = Counter()
    together = threading.Barrier(3, timeout=30)
    now_open = most_open = 0
    lock = threading.Lock()
    plain = Store.open

    class File:
        """As `open` gives it, told when it is closed."""

        def __init__(self, store: Store, name: str) -> None:
            self.file, self.name = plain(store, name), name

        def __enter__(self) -> BinaryIO:
            nonlocal now_open, most_open
            with lock:
                opened[self.name] += 1
                now_open += 1
                most_open = max(most_open, now_open)
            together.wait()
            return self.file

        def __exit__(self, *_: object) -> None:
            nonlocal now_open
            with lock:
                now_open -= 1
            self.file.close()

    monkeypatch.setattr(
        verification.Store,
        "open",
        lambda store, name: File(store, name) if name.startswith("shards/") else plain(store, name),
    )
    assert verify(stage.url, 3) == []
    assert most_open == 3
    assert opened == Counter({f"shards/{number:05d}.tar": 1 for number in range(SHARDS)})
