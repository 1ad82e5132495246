"""LWM's checkpoint file, `params::FILE`, read in place: an index of its leaves, then any part of any leaf.

The file is msgpack records one after another, without a header: [key path, bin]. The bin is msgpack again: an ext of
type 1 around (shape, dtype name, C-order bytes), or, for arrays past 2^30 bytes, a map with the shape and a map of
chunks, each such an ext over a flat stretch of the array. A leaf of the released 7B can be gigabytes, so nothing is
unpacked whole: `msgpack` reads the small parts, and data stay in the mapped file until they are read.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from storage.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Leaf:
    """One array in a buffer: its shape, its dtype, and where its flat stretches lie as (first byte, elements)."""

    buffer: mmap.mmap | memoryview
    shape: tuple[int, ...]
    dtype: torch.dtype
    stretches: tuple[tuple[int, int], ...]

    def read(self, index: int | None = None) -> Tensor:
        """A copy of the whole array, or of entry `index` along its first axis (a layer of a stacked leaf)."""
        shape = self.shape if index is None else self.shape[1:]
        start = 0 if index is None else index * prod(shape)
        end = start + prod(shape)
        out = torch.empty(end - start, dtype=self.dtype)
        target, source = memoryview(out.view(torch.uint8).numpy().data), memoryview(self.buffer)
        size, at = self.dtype.itemsize, 0
        for first_byte, count in self.stretches:
            lo, hi = max(start - at, 0), min(end - at, count)
            if lo < hi:
                data = source[first_byte + lo * size : first_byte + hi * size]
                target[(at + lo - start) * size : (at + hi - start) * size] = data
            at += count
        return out.reshape(shape)


def read_leaves(path: str | Path) -> dict[str, Leaf]:
    """Index of the file at `path` (an LWM "params::" before it is dropped): flax paths joined by "/" to leaves.

    A leading "params" of the key path, which train states carry, is left out. Raises UserError where the file is
    missing, cut short or not of this format.
    """
    path = Path(str(path).removeprefix("params::"))
    if not path.is_file():
        raise UserError(f"{path}: no such file; name an LWM checkpoint (the FILE of params::FILE)")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; copy the LWM checkpoint again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    leaves: dict[str, Leaf] = {}
    cursor = _Cursor(mapped)
    try:
        while cursor.at < len(mapped):
            cursor.expect("array", 2)
            key = [str(part) for part in cursor.small()]
            cursor.header("bin")
            while key[0] == "params" and len(key) > 1:
                key = key[1:]
            leaves["/".join(key)] = _leaf(cursor)
    except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as error:
        raise UserError(
            f"{path}: byte {cursor.at} is not LWM's msgpack format ({error}); copy the file again, or name another"
        ) from error
    return leaves


def _leaf(cursor: _Cursor) -> Leaf:
    kind, entries = cursor.peek()
    if kind == "ext":
        shape, dtype, stretch = _array(cursor)
        return Leaf(cursor.data, shape, dtype, (stretch,))
    if kind != "map":
        raise ValueError(f"a leaf cannot be of kind {kind}")
    cursor.header("map")
    shape, dtypes, stretches = (), set(), []
    for _ in range(entries):
        key = cursor.small()
        if key == "shape":
            sizes = cursor.small()
            shape = tuple(int(sizes[str(i)]) for i in range(len(sizes)))
        elif key == "chunks":
            order = {}
            for _ in range(cursor.header("map")):
                number = int(cursor.small())
                _, dtype, order[number] = _array(cursor)
                dtypes.add(dtype)
            stretches = [order[i] for i in range(len(order))]
        else:
            cursor.small()
    if len(dtypes) != 1 or sum(count for _, count in stretches) != prod(shape):
        raise ValueError(f"chunks do not make up an array of shape {shape}")
    return Leaf(cursor.data, shape, dtypes.pop(), tuple(stretches))


def _array(cursor: _Cursor) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Step over one array: its shape, dtype and stretch."""
    cursor.header("ext")
    cursor.expect("array", 3)
    shape, name = tuple(int(n) for n in cursor.small()), cursor.small()
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is none of {', '.join(DTYPES)}")
    n_bytes = cursor.header("bin")
    if n_bytes != prod(shape) * DTYPES[name].itemsize or cursor.at + n_bytes > len(cursor.data):
        raise ValueError(f"{n_bytes} bytes are no array {shape} of {name}, or the file was cut short")
    start, cursor.at = cursor.at, cursor.at + n_bytes
    return shape, DTYPES[name], (start, prod(shape))


# By first byte of a header with an explicit length: kind, bytes of the length (big-endian; an ext has a type byte too).
_HEADERS = {0xC4 + i: ("bin", 1 << i) for i in range(3)} | {0xC7 + i: ("ext", 1 << i) for i in range(3)}
_HEADERS |= {0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
_SMALL = 1 << 16


class _Cursor:
    """A place in the file: steps over the headers of large objects, unpacks small ones with msgpack."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def peek(self) -> tuple[str, int]:
        """Kind and length of the header at this place."""
        kind, length, _ = self._parse()
        return kind, length

    def header(self, kind: str) -> int:
        """Step over a header of this kind; its length (bytes, or entries)."""
        found, length, size = self._parse()
        if found != kind:
            raise ValueError(f"expected {kind}, found {found}")
        self.at += size
        return length

    def expect(self, kind: str, length: int) -> None:
        """Step over a header of this kind and length."""
        if (found := self.header(kind)) != length:
            raise ValueError(f"expected {kind} of {length}, found {found}")

    def small(self) -> Any:
        """Unpack the object at this place, at most 64 KB of it."""
        unpacker = msgpack.Unpacker(max_buffer_size=_SMALL)
        unpacker.feed(self.data[self.at : self.at + _SMALL])
        value = unpacker.unpack()
        self.at += unpacker.tell()
        return value

    def _parse(self) -> tuple[str, int, int]:
        first = self.data[self.at]
        if 0x80 <= first <= 0x8F:
            return "map", first & 0x0F, 1
        if 0x90 <= first <= 0x9F:
            return "array", first & 0x0F, 1
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4), 2
        if first not in _HEADERS:
            return f"byte 0x{first:02x}", 0, 1
        kind, width = _HEADERS[first]
        length = int.from_bytes(self.data[self.at + 1 : self.at + 1 + width], "big")
        return kind, length, 1 + width + (kind == "ext")
