"""Which elements of which file fill which range, and the bytes of the files: without an engine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from model.checkpoint.loader import copies
from model.checkpoint.manifest import FileEntry, Manifest, Range
from model.checkpoint.snapshot import Snapshot, plan_files, tensor_key
from model.checkpoint.zero_state import PARTS, Fragment

NUMELS = {"embed": 97, "norm": 3, "up": 40}


def cut(numels: dict[str, int], marks: list[int]) -> list[Range]:
    """All parameters, laid end to end and cut at these places."""
    ranges, offset = [], 0
    for name, numel in numels.items():
        inner = sorted({0, numel, *(mark - offset for mark in marks if 0 < mark - offset < numel)})
        ranges += [Range(name, start, stop - start) for start, stop in pairwise(inner)]
        offset += numel
    return ranges


marks = st.lists(st.integers(0, sum(NUMELS.values())), max_size=8)


@given(marks, marks, st.randoms())
def test_any_cut_is_filled_from_any_other(written, needed, random):
    held = cut(NUMELS, written)
    random.shuffle(held)
    files = {f"file {i}": FileEntry(0, "", 0, tuple(held[i::3])) for i in range(3)}
    values = {name: torch.randn(numel) for name, numel in NUMELS.items()}
    stored = {one: values[one.name][one.start : one.stop] for one in held}
    wanted = cut(NUMELS, needed)
    filled = [torch.full((one.numel,), torch.nan) for one in wanted]
    for file, plan in copies(wanted, files).items():
        for copy in plan:
            assert copy.source in files[file].ranges
            piece = stored[copy.source][copy.first : copy.first + copy.numel]
            filled[copy.target][copy.place : copy.place + copy.numel] = piece
    for one, tensor in zip(wanted, filled, strict=True):
        assert torch.equal(tensor, values[one.name][one.start : one.stop])


@pytest.mark.parametrize("missing", range(3))
def test_only_needed_files_are_read_and_an_element_in_none_is_named(missing):
    held = cut({"up": 30}, [10, 20])
    files = {f"file {i}": FileEntry(0, "", 0, (one,)) for i, one in enumerate(held)}
    assert set(copies([Range("up", 12, 3)], files)) == {"file 1"}
    del files[f"file {missing}"]
    with pytest.raises(ValueError, match=f"no file has up from its element {10 * missing} on"):
        copies([Range("up", 0, 30)], files)


def fragments() -> list[Fragment]:
    generator = torch.Generator().manual_seed(0)
    return [
        Fragment(one, {part: torch.randn(one.numel, generator=generator) for part in PARTS})
        for one in cut(NUMELS, [13, 99])
    ]


def test_a_snapshots_bytes_are_safetensors_files_of_what_was_there():
    held, snapshot = fragments(), Snapshot()
    for _ in range(2):  # the second time in the memory of the first
        snapshot.take(held)
        ((data, header_bytes, ranges),) = snapshot.files()
        assert load(bytes(data[:header_bytes]) + bytes(len(data) - header_bytes)).keys() == load(bytes(data)).keys()
        assert ranges == tuple(fragment.range for fragment in held)
        tensors = load(bytes(data))
        assert len(tensors) == len(PARTS) * len(held)
        for fragment in held:
            for part, tensor in fragment.parts.items():
                assert torch.equal(tensors[tensor_key(part, fragment.range)], tensor)
        assert snapshot.n_bytes == len(data)
        for fragment in held:
            fragment.parts["weight"].add_(1)


def test_a_next_file_begins_where_one_is_full():
    held = fragments()
    files = plan_files(held, file_bytes=600)
    assert [one for file in files for one in file.ranges] == [fragment.range for fragment in held]
    assert len(files) == 3
    assert all(len(file.ranges) == 1 or file.size - len(file.header) <= 600 for file in files)


def test_every_flipped_character_of_a_manifest_is_noticed():
    manifest = Manifest(
        step=7, world_size=2, dp=2, sp=1, zero_stage=3, precision="bf16", parameters={"up": ((5, 8), 1)},
        adam_steps=(6, 7), client_state={"loader": {"position": 14, "rate": 0.1}},
        files={"rank-0": FileEntry(9, "ab", 0, (Range("up", 0, 40),), 8, "cd")}, random=("rank-0",),
    )  # fmt: skip
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    for place, character in enumerate(data):
        if chr(character).isdigit():
            other = data[:place] + (b"3" if character != ord("3") else b"4") + data[place + 1 :]
            with pytest.raises(ValueError, match="its COMMIT"):
                Manifest.from_bytes(other)
    with pytest.raises(ValueError, match="its COMMIT cannot be read"):
        Manifest.from_bytes(data[:-9])
    with pytest.raises(ValueError, match="format 1, which this version does not know"):
        Manifest.from_bytes(json.dumps({"format": 1}).encode())


def test_a_manifest_of_format_2_is_read_as_it_was_and_held_against_its_hash():
    manifest = Manifest(
        step=7, world_size=1, dp=1, sp=1, zero_stage=3, precision="bf16", parameters={"up": ((5, 8), 1)},
        adam_steps=(7,), client_state={"rate": 0.1}, files={"rank-0": FileEntry(9, "ab", 0, (Range("up", 0, 40),))},
        random=("rank-0",),
    )  # fmt: skip
    data = format_2(manifest)
    assert Manifest.from_bytes(data) == manifest
    with pytest.raises(ValueError, match="its COMMIT has another sha256"):
        Manifest.from_bytes(data.replace(b"0.1", b"0.2"))


def format_2(manifest: Manifest) -> bytes:
    """As the version before wrote it."""
    body = json.loads(json.dumps({"format": 2, **asdict(manifest)}))
    for entry in body["files"].values():
        del entry["header_bytes"], entry["header_sha256"]
    sha256 = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha256}, sort_keys=True).encode()
