"""Verification reads every file once, several at a time, and names each that is not as it was committed."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from pipelines.dag.manifest import MANIFEST, Declaration, Manifest, PlainRecord
from pipelines.inspect import verify as verification
from pipelines.inspect.verify import verify
from pipelines.tokenize.record import PARTITIONS, TokenizedPartition, write_partitions
from storage.store import Store
from testing.tiny_run import VOCABULARY
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

SHARDS, DOCUMENTS = 12, 4
OWN, OTHER = "0123456789abcdef", "fedcba9876543210"


@dataclass
class Run:
    """A tokenize stage and a pack stage that are done. format: of their manifests."""

    root: Store
    format: int

    def shared(self, name: str) -> str:
        """A file of a partition: up to format 2, in the folder of the fingerprint that made it."""
        stage = "pack-a" if name.startswith("shards/") else "tokenize"
        return f"stages/{stage}/{OWN}/{name}" if self.format < 3 else f"stages/{stage}/{name}"

    def path(self, name: str) -> Path:
        return Path(self.root.path(name))

    def finish(self, stage: str, folder: str, outputs: dict[str, Any], figures: dict[str, Any]) -> None:
        store = self.root.at("stages", stage, folder)
        declaration = Declaration(stage, stage.partition("-")[0], {}, 1, {})
        facts: dict[str, Any] = {"fingerprint": declaration.fingerprint, "format": self.format}
        store.write_json(MANIFEST, Manifest(declaration, PlainRecord(outputs, figures), **facts).to_json())


@pytest.fixture(params=[2, 3], ids=lambda number: f"format-{number}")
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    made = Run(Store(str(tmp_path / "run")), request.param)
    names, stats = [], []
    for number in range(SHARDS):
        documents = [Document(f"d{n}", "a", np.full(40 + n, 5, np.int32), ((1, 40 + n),)) for n in range(20)]
        names.append(f"shards/{number:05d}.tar")
        with made.root.writing(made.shared(names[-1])) as file:
            sequences = pack(documents, 128, VOCABULARY, "text", key_prefix=f"s{number}-")
            stats.append(write_shard(file, sequences, VOCABULARY))
    for folder, count in ((OWN, SHARDS), (OTHER, 3))[: made.format - 1]:  # fingerprints share files since format 3
        store = made.root.at("stages", "pack-a", folder)
        shards = ShardSet(128, VOCABULARY, "text", tuple(names[:count]), tuple(stats[:count]))
        home, file = (store, "") if made.format < 3 else (made.root.at("stages", "pack-a"), f"{folder}/")
        write_set(home, f"{file}sets/a-train.json", shards)
        sets = {"a": {"train": {"file": f"{file}sets/a-train.json"}}}
        made.finish("pack-a", folder, {"files": store.hashes("sets"), "sets": sets}, {})
    parts = []
    for number in range(DOCUMENTS):
        file = f"documents/{number}.parquet"
        made.root.write_json(made.shared(file), number)
        sha256 = made.root.sha256(made.shared(file))
        parts.append(TokenizedPartition(str(number), "a", False, file, 1, 1, 0, sha256))
    outputs: dict[str, Any] = {"partitions": [asdict(part) for part in parts]}
    if made.format >= 3:
        store = made.root.at("stages", "tokenize", OWN)
        write_partitions(store, parts)
        outputs = {"partitions": PARTITIONS, "files": {PARTITIONS: store.sha256(PARTITIONS)}}
    made.finish("tokenize", OWN, outputs, {"documents": DOCUMENTS, "tokens": DOCUMENTS})
    return made


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("threads", [1, 5])
def test_every_file_that_is_not_as_it_was_committed_is_named_in_order(run: Run, threads: int) -> None:
    assert verify(run.root.url, threads) == []
    damaged = [run.shared(name) for name in ("shards/00002.tar", "shards/00007.tar", "documents/1.parquet")]
    missing = [run.shared(name) for name in ("shards/00011.tar", "documents/2.parquet")]
    for name in damaged:
        damage(run.path(name))
    for name in missing:
        run.root.delete(name)
    found = verify(run.root.url, threads)
    named = list(dict.fromkeys(problem.partition(": ")[0] for problem in found))
    assert named == sorted([*damaged, *missing])
    assert [problem for problem in found if problem.endswith(": missing")] == [f"{name}: missing" for name in missing]
    assert len(found) == len(set(found)), "each once, whichever fingerprints have it"


def test_a_stage_alone_is_checked_with_the_files_of_its_partitions(run: Run) -> None:
    for folder, name in (("pack-a", "shards/00002.tar"), ("tokenize", "documents/1.parquet")):
        url = run.root.at("stages", folder, OWN).url
        assert verify(url) == []
        damage(run.path(run.shared(name)))
        assert {problem.partition(": ")[0] for problem in verify(url)} == {name}


@pytest.mark.parametrize("extension", ["json", "npy"])
def test_a_damaged_index_is_named_and_what_it_lists_is_not_judged_by_it(run: Run, extension: str) -> None:
    run.root.delete(run.shared("shards/00011.tar"))
    damage(run.path(index := f"stages/pack-a/{OWN}/sets/a-train.{extension}"))
    (problem,) = verify(run.root.url)
    assert problem.startswith(f"{index}: sha256 is ")


def test_a_damaged_list_of_partitions_is_named_and_what_it_lists_is_not_judged_by_it(run: Run) -> None:
    if run.format < 3:
        pytest.skip("they are in the manifest itself")
    run.root.delete(run.shared("documents/1.parquet"))
    damage(run.path(name := f"stages/tokenize/{OWN}/{PARTITIONS}"))
    (problem,) = verify(run.root.url)
    assert problem.startswith(f"{name}: sha256 is ")


def test_a_file_that_the_disk_does_not_give_is_named(run: Run) -> None:
    path = run.path(run.shared("documents/3.parquet"))
    path.unlink()
    path.mkdir()
    (problem,) = verify(run.root.url)
    assert problem.startswith(f"{run.shared('documents/3.parquet')}: cannot be read")


def test_a_checkpoint_without_its_commit_is_named_but_an_emptied_folder_is_none(run: Run) -> None:
    stage = run.root.at("stages", "pack-a", OWN)
    Path(stage.path("checkpoints/step-00000003")).mkdir(parents=True)
    assert verify(stage.url) == []
    stage.write_json("checkpoints/step-00000006/rank-0.json", 0)
    assert verify(stage.url) == ["checkpoints/step-00000006/COMMIT: missing"]


def test_files_are_read_side_by_side_one_a_thread_and_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert verify(run.root.url, 3) == []
    assert most_open == 3
    assert opened == Counter({f"shards/{number:05d}.tar": 1 for number in range(SHARDS)})
