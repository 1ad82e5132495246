"""The node's cache of shards: whole or absent, within its bound, one fetch a shard however many ask."""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.train.data import shard_opener
from pipelines.train.shard_cache import ShardCache
from storage.errors import BadData
from testing.tiny_run import VOCABULARY
from tokenization.document import PackedSequence
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import write_shard


class Remote:
    """Shards in memory, and how often each was opened."""

    def __init__(self, shards: int) -> None:
        self.bodies: dict[str, bytes] = {}
        self.stats: dict[str, ShardStats] = {}
        self.opened: Counter[str] = Counter()
        weight = np.array([0, 0.5, 0.5, 0], np.float32)
        for number in range(shards):
            file = io.BytesIO()
            tokens = np.full(4, number, np.int32)
            sequence = PackedSequence("a", tokens, np.array([0, 3, 4], np.int32), weight, 1, ({},))
            self.stats[f"{number}.tar"] = write_shard(file, [sequence], VOCABULARY)
            self.bodies[f"{number}.tar"] = file.getvalue()

    def __call__(self, name: str) -> io.BytesIO:
        self.opened[name] += 1
        time.sleep(0.01)
        return io.BytesIO(self.bodies[name])

    def through(self, cache: ShardCache, name: str) -> bytes:
        with cache.open(self, name, self.stats[name]) as file:
            return file.read()


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


SIZE = len(Remote(1).bodies["0.tar"])


def test_a_shard_is_fetched_once_however_many_ask_at_once(tmp_path: Path) -> None:
    remote = Remote(3)
    names = sorted(remote.bodies) * 8
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda name: remote.through(ShardCache(tmp_path, 10 * SIZE), name), names))
    assert got == [remote.bodies[name] for name in names]
    assert set(remote.opened.values()) == {1}
    assert held(tmp_path) == {f"{stats.sha256}.tar" for stats in remote.stats.values()}


def test_what_does_not_fit_is_read_from_the_store_and_removes_nothing_in_use(tmp_path: Path) -> None:
    remote, cache = Remote(3), ShardCache(tmp_path, 2 * SIZE)
    for _ in range(3):
        for name, body in remote.bodies.items():
            assert remote.through(cache, name) == body
    assert remote.opened == {"0.tar": 1, "1.tar": 1, "2.tar": 3}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * SIZE


def test_the_least_recently_used_leaves_when_idle(tmp_path: Path) -> None:
    remote, cache = Remote(4), ShardCache(tmp_path, 2 * SIZE, idle=100)
    for name, ago in (("0.tar", 200), ("1.tar", 300)):
        remote.through(cache, name)
        os.utime(tmp_path / f"{remote.stats[name].sha256}.tar", (0, time.time() - ago))
    still_open = cache.open(remote, "0.tar", remote.stats["0.tar"])  # used now
    remote.through(cache, "2.tar")
    assert held(tmp_path) == {f"{remote.stats[name].sha256}.tar" for name in ("0.tar", "2.tar")}
    for name in ("0.tar", "2.tar"):
        os.utime(tmp_path / f"{remote.stats[name].sha256}.tar", (0, 0))
    remote.through(cache, "3.tar")
    assert len(held(tmp_path)) == 2
    assert still_open.read() == remote.bodies["0.tar"], "an open file outlives its removal"
    still_open.close()


def test_a_shard_that_is_not_what_was_written_is_refused_and_not_kept(tmp_path: Path) -> None:
    remote, cache = Remote(1), ShardCache(tmp_path, 2 * SIZE)
    remote.bodies["0.tar"] = remote.bodies["0.tar"][:-1] + b"!"
    with pytest.raises(BadData, match=r"its sha256 is .*, the manifest says"):
        cache.open(remote, "0.tar", remote.stats["0.tar"])
    assert held(tmp_path) == set()


def test_what_rotted_on_the_nodes_disk_is_fetched_anew_by_the_next_process(tmp_path: Path) -> None:
    remote = Remote(1)
    assert remote.through(ShardCache(tmp_path, SIZE), "0.tar") == remote.bodies["0.tar"]
    path = tmp_path / f"{remote.stats['0.tar'].sha256}.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert remote.through(ShardCache(tmp_path, SIZE), "0.tar") == remote.bodies["0.tar"]
    assert remote.through(ShardCache(tmp_path, SIZE), "0.tar") == remote.bodies["0.tar"]
    assert remote.opened["0.tar"] == 2


def test_what_a_killed_fetch_left_is_fetched_anew(tmp_path: Path) -> None:
    remote, cache = Remote(1), ShardCache(tmp_path, SIZE)
    (tmp_path / f"{remote.stats['0.tar'].sha256}.part").write_bytes(b"half")
    assert remote.through(cache, "0.tar") == remote.bodies["0.tar"]
    assert held(tmp_path) == {f"{remote.stats['0.tar'].sha256}.tar"}


@pytest.mark.parametrize(("is_local", "gib", "cached"), [(True, 1, False), (False, 0, False), (False, 1, True)])
def test_training_caches_shards_of_object_stores_where_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool, gib: float, cached: bool
) -> None:
    remote = Remote(1)
    monkeypatch.setattr("pipelines.train.data.cache_folder", lambda on_local_disk: tmp_path)
    job = SimpleNamespace(
        shards=SimpleNamespace(is_local=is_local, open_ranged=remote),
        recipe=SimpleNamespace(training=SimpleNamespace(shard_cache_gib=gib)),
    )
    shards = ShardSet(4, VOCABULARY, "text", tuple(remote.stats), tuple(remote.stats.values()))
    opened = shard_opener(job, {"a": shards})  # type: ignore[arg-type]
    for _ in range(2):
        with opened("0.tar") as file:
            assert file.read() == remote.bodies["0.tar"]
    assert remote.opened["0.tar"] == (1 if cached else 2)
