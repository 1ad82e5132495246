"""A rank reads of a checkpoint about what it needs, each byte held against a hash, whatever mesh and stage wrote it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file

from model.checkpoint import loader
from model.checkpoint.loader import copies
from model.checkpoint.manifest import DamagedError, FileEntry, Range
from model.checkpoint.snapshot import Snapshot, tensor_key
from model.checkpoint.tensor_file import CHUNK, Wanted, read_header, read_tensors
from model.checkpoint.zero_state import PARTS, Fragment
from storage.store import Store

RANKS = 8
NUMELS = {f"layers.{n}.{name}": size for n in range(4) for name, size in (("norm", 999), ("up", 1_500_000))}
TOTAL = sum(NUMELS.values())
SHARE = 4 * len(PARTS) * TOTAL // RANKS
"""Bytes of a rank's part of the weights and both moments."""


def of_stage_3(rank: int) -> Iterator[Range]:
    """Of each parameter a rank's part."""
    for name, numel in NUMELS.items():
        part = -(-numel // RANKS)
        if (size := min(part, numel - rank * part)) > 0:
            yield Range(name, rank * part, size)


def of_stage_2(rank: int) -> Iterator[Range]:
    """Of all parameters, laid end to end, a rank's part."""
    begin, end = TOTAL * rank // RANKS, TOTAL * (rank + 1) // RANKS
    for (name, numel), stop in zip(NUMELS.items(), accumulate(NUMELS.values()), strict=True):
        first, last = max(begin, stop - numel), min(end, stop)
        if first < last:
            yield Range(name, first - (stop - numel), last - first)


LAYOUTS = {"stage 2": of_stage_2, "stage 3": of_stage_3}


@pytest.fixture(scope="module")
def values() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {part: {name: torch.randn(n, generator=generator) for name, n in NUMELS.items()} for part in PARTS}


def fragment(one: Range, values: dict[str, dict[str, torch.Tensor]]) -> Fragment:
    return Fragment(one, {part: values[part][one.name][one.start : one.stop] for part in PARTS})


def written(folder: Path, layout: str, values: dict[str, dict[str, torch.Tensor]]) -> dict[str, FileEntry]:
    """The files of all ranks."""
    files = {}
    for rank in range(RANKS):
        snapshot = Snapshot()
        snapshot.take([fragment(one, values) for one in LAYOUTS[layout](rank)])
        for data, header_bytes, ranges in snapshot.files():
            (folder / f"rank-{rank}").write_bytes(data)
            hashes = (hashlib.sha256(part).hexdigest() for part in (data, data[:header_bytes]))
            files[f"rank-{rank}"] = FileEntry(len(data), next(hashes), rank, ranges, header_bytes, next(hashes))
    return files


class CountedStore(Store):
    """Counts the bytes that are read of it."""

    n_bytes = 0

    def open(self, name: str) -> Any:
        store = self

        class Counted(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                got = super().readinto(buffer)
                store.n_bytes += got
                return got

        return Counted(self.path(name))


def read(root: Store, files: dict[str, FileEntry], layout: str, rank: int) -> list[Fragment]:
    """A rank's part of what is stored."""
    needed = list(LAYOUTS[layout](rank))
    fragments = [Fragment(one, {part: torch.full((one.numel,), torch.nan) for part in PARTS}) for one in needed]
    for name, plan in copies(needed, files).items():
        loader.fill(fragments, plan, PARTS, root, name, files[name])
    return fragments


@pytest.mark.parametrize(("before", "after"), [("stage 3", "stage 2"), ("stage 2", "stage 3"), ("stage 3", "stage 3")])
def test_at_another_stage_a_rank_reads_little_more_than_its_share(tmp_path, values, before, after):
    """Of every range a chunk more at most at either end, and the headers: not the files of all ranks."""
    files = written(tmp_path, before, values)
    headers = sum(entry.header_bytes for entry in files.values())
    for rank in range(RANKS):
        root = CountedStore(str(tmp_path))
        fragments = read(root, files, after, rank)
        for one in fragments:
            for part, tensor in one.parts.items():
                assert torch.equal(tensor, values[part][one.range.name][one.range.start : one.range.stop])
        pieces = sum(len(plan) for plan in copies([one.range for one in fragments], files).values())
        assert SHARE * 0.99 < root.n_bytes < SHARE * 1.01 + headers + len(PARTS) * pieces * 2 * CHUNK
        assert root.n_bytes < 2 * SHARE


def test_a_changed_byte_is_noticed_where_it_is_read(tmp_path, values):
    files = written(tmp_path, "stage 3", values)
    path, entry = tmp_path / "rank-5", files["rank-5"]
    whole = path.read_bytes()

    def read_all() -> None:
        for rank in range(RANKS):
            read(Store(str(tmp_path)), files, "stage 2", rank)

    for place in (3, entry.header_bytes - 9, entry.header_bytes, entry.size // 2, entry.size - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match="rank-5 has another sha256 than when it was written"):
            read_all()
    path.write_bytes(whole[:1000])
    with pytest.raises(DamagedError, match="rank-5 is 1000 bytes, not"):
        read(Store(str(tmp_path)), files, "stage 3", 5)
    path.unlink()
    with pytest.raises(DamagedError, match="rank-5 is missing"):
        read(Store(str(tmp_path)), files, "stage 3", 5)


def test_files_that_were_hashed_whole_are_still_read_and_held_against_that(tmp_path, values):
    """As they were before format 3: without hashes in the header."""
    files = {}
    for rank in range(RANKS):
        ones = list(of_stage_3(rank))
        path = tmp_path / f"rank-{rank}"
        parts = [(part, one, fragment(one, values).parts[part].clone()) for one in ones for part in PARTS]
        save_file({tensor_key(part, one): tensor for part, one, tensor in parts}, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files[f"rank-{rank}"] = FileEntry(path.stat().st_size, sha256, rank, tuple(ones))
    for one in read(Store(str(tmp_path)), files, "stage 2", 3):
        for part, tensor in one.parts.items():
            assert torch.equal(tensor, values[part][one.range.name][one.range.start : one.range.stop])
    path = tmp_path / "rank-5"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="rank-5 has another sha256 than when it was written"):
        read(Store(str(tmp_path)), files, "stage 2", 3)


def test_a_range_longer_than_what_is_read_at_a_time_comes_whole(tmp_path, values):
    files = written(tmp_path, "stage 2", values)
    entry = files["rank-0"]
    with (tmp_path / "rank-0").open("rb") as file:
        header = read_header(file, entry.header_bytes, entry.header_sha256)
        target = torch.empty((entry.size - entry.header_bytes) // 4)
        read_tensors(file, header, [Wanted(header.size, target)])
    expected = torch.cat([fragment(one, values).parts[part] for one in entry.ranges for part in PARTS])
    assert torch.equal(target, expected)


def test_a_file_in_a_store_is_read_by_the_ranges_that_are_needed(tmp_path, values, monkeypatch):
    files = written(tmp_path, "stage 3", values)
    store, asked = Store("memory://tensor-file"), []
    for name in files:
        with store.writing(name) as file:
            file.write((tmp_path / name).read_bytes())
    cat = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return cat(self, path, start, end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    for one in read(store, files, "stage 2", 3):
        for part, tensor in one.parts.items():
            assert torch.equal(tensor, values[part][one.range.name][one.range.start : one.range.stop])
    assert SHARE < sum(asked) < 2 * SHARE
