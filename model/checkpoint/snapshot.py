"""A rank's fragments copied to host memory, already in the bytes of the safetensors files that they will be.

So hashing, writing and sending run in a thread that neither touches the engine nor holds Python's lock for long, and no
second copy is made. The memory, 12 bytes for each element that the rank holds, is used again from save to save.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.manifest import Range
from model.checkpoint.tensor_file import chunk_hashes, no_hashes
from model.checkpoint.zero_state import PARTS, Fragment

FILE_BYTES = 2**29
"""About the size at which a next file begins."""


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file to write: its fragments, a header of its final length without hashes, its size in bytes."""

    fragments: tuple[Fragment, ...]
    header: bytes
    size: int

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The ranges of parameters in it."""
        return tuple(fragment.range for fragment in self.fragments)


def tensor_key(part: str, fragment: Range) -> str:
    """The name of a tensor in a file: which of `PARTS` it is, its parameter and its first element."""
    return f"{part}/{fragment.name}@{fragment.start}"


class Snapshot:
    """Host memory for what a rank saves."""

    def __init__(self) -> None:
        self._files: list[PlannedFile] = []
        self._buffers: list[Tensor] = []

    @property
    def n_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(buffer.numel() for buffer in self._buffers)

    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy these over what was copied before."""
        self._files = plan_files(fragments)
        if [buffer.numel() for buffer in self._buffers] != [file.size for file in self._files]:
            self._buffers = []  # first, so that old and new buffers never exist at once
            self._buffers = [torch.empty(file.size, dtype=torch.uint8) for file in self._files]
        for file, buffer in zip(self._files, self._buffers, strict=True):
            data = buffer[len(file.header) :].view(torch.float32)
            place = 0
            for fragment, part in itertools.product(file.fragments, PARTS):
                tensor = fragment.parts[part]
                data[place : place + tensor.numel()].copy_(tensor)
                place += tensor.numel()

    def files(self) -> Iterator[tuple[memoryview, int, tuple[Range, ...]]]:
        """The bytes of each file, the size of its header, and the ranges in it."""
        for file, buffer in zip(self._files, self._buffers, strict=True):
            data, place = buffer.numpy().data, len(file.header)
            data[:place] = _header(file.fragments, chunk_hashes(data[place:]))
            yield data, place, file.ranges


def plan_files(fragments: Sequence[Fragment], file_bytes: int = FILE_BYTES) -> list[PlannedFile]:
    """Distribute the fragments, in order, over files of about `file_bytes`."""
    groups: list[list[Fragment]] = []
    size = 0
    for fragment in fragments:
        n_bytes = 4 * len(PARTS) * fragment.range.numel
        if not groups or size + n_bytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(fragment)
        size += n_bytes
    return [_file_of(group) for group in groups]


def _file_of(fragments: Sequence[Fragment]) -> PlannedFile:
    n_bytes = sum(4 * len(PARTS) * fragment.range.numel for fragment in fragments)
    header = _header(fragments, no_hashes(n_bytes))
    return PlannedFile(tuple(fragments), header, len(header) + n_bytes)


def _header(fragments: Sequence[Fragment], hashes: str) -> bytes:
    shapes = {tensor_key(part, fragment.range): [fragment.range.numel] for fragment in fragments for part in PARTS}
    return safetensors_header(shapes, "F32", 4, {"sha256": hashes})


def safetensors_header(
    shapes: Mapping[str, Sequence[int]], dtype: str, item_bytes: int, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a safetensors file of tensors of one dtype, in this order: a length, JSON, and spaces up to a
    multiple of 8 bytes. dtype: by the format's name.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, shape in shapes.items():
        stop = place + item_bytes * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
