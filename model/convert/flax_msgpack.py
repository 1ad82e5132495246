"""LWM's checkpoint files, read in place: an index of the parameters' leaves, then any part of any leaf.

There are three formats, each without a header, told apart by what is in them:

    params::FILE        msgpack records one after another, [key path, bin]; the bin is msgpack again, of a leaf
    trainstate::FILE    the same, with the optimizer's leaves and counters beside the parameters, which are passed over
    flax_params::FILE   one msgpack map of maps, whose ends are leaves

A leaf is an ext of type 1 around (shape, dtype name, C-order bytes), or, for arrays past 2^30 bytes, a map with the
shape and a map of chunks, each such an ext over a flat stretch of the array. A leaf of the released 7B can be
gigabytes, so nothing is unpacked whole: `msgpack` reads the small parts, and data stay in the mapped file until they
are read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from model.convert.lwm_settings import file_of
from storage.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

ROOTS = ("transformer", "lm_head", "vision_head")
"""What the flax paths of a model's parameters begin with."""
_CHUNKED = "__msgpack_chunked_array__"
_DEPTH = 32


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
                self._forget(first_byte + lo * size, first_byte + hi * size)
            at += count
        return out.reshape(shape)

    def _forget(self, start: int, end: int) -> None:
        """Take pages of the file out of the process again: else all that was ever read counts as its memory."""
        if isinstance(self.buffer, mmap.mmap):
            first = start - start % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


def read_leaves(path: str | Path) -> dict[str, Leaf]:
    """Index of the parameters in the file at `path`: flax paths joined by "/" to leaves.

    A prefix that names the format is dropped, and so is a leading "params" of the key paths. Leaves
    that are none of the model's parameters are passed over. Raises UserError where the file is missing, cut short or of
    no such format, or has no parameters.
    """
    path = Path(file_of(str(path)))
    if not path.is_file():
        raise UserError(f"{path}: no such file; name an LWM checkpoint (the FILE of params::FILE)")
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; copy the LWM checkpoint again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    leaves: dict[str, Leaf] = {}
    cursor = _Cursor(mapped)
    try:
        for key in _records(cursor):
            kept = key
            while kept and kept[0] == "params":
                kept = kept[1:]
            if kept and kept[0] in ROOTS:
                leaves["/".join(kept)] = _leaf(cursor)
            else:
                cursor.skip()
    except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as error:
        raise UserError(
            f"{path}: byte {cursor.at} is not LWM's msgpack format ({error}); copy the file again, or name another"
        ) from error
    if not leaves:
        raise UserError(f"{path}: has none of the parameters of an LWM model; name a checkpoint of one")
    return leaves


def _records(cursor: _Cursor) -> Iterator[tuple[str, ...]]:
    """Key paths, each while the cursor stands before its value, over which the caller steps."""
    if cursor.peek()[0] == "map":
        yield from _nested(cursor, ())
        if cursor.at < len(cursor.data):
            raise ValueError("there is more behind the map")
        return
    while cursor.at < len(cursor.data):
        cursor.expect("array", 2)
        key = tuple(str(part) for part in cursor.small())
        end = cursor.header("bin") + cursor.at
        if end > len(cursor.data):
            raise ValueError("the file was cut short")
        yield key
        if cursor.at != end:
            raise ValueError(f"a record ends at byte {end}")


def _nested(cursor: _Cursor, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if len(path) > _DEPTH:
        raise ValueError(f"maps are nested deeper than {_DEPTH}")
    for _ in range(cursor.header("map")):
        key = (*path, str(cursor.small()))
        if cursor.peek()[0] == "map" and not cursor.is_chunked():
            yield from _nested(cursor, key)
        else:
            yield key


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
    is_whole = n_bytes == prod(shape) * DTYPES[name].itemsize and cursor.at + n_bytes <= len(cursor.data)
    if not is_whole or min(shape, default=0) < 0:
        raise ValueError(f"{n_bytes} bytes are no array {shape} of {name}, or the file was cut short")
    start, cursor.at = cursor.at, cursor.at + n_bytes
    return shape, DTYPES[name], (start, prod(shape))


# By first byte of a header with an explicit length: kind, bytes of the length (big-endian; an ext has a type byte too).
_HEADERS = {0xC4 + i: ("bin", 1 << i) for i in range(3)} | {0xC7 + i: ("ext", 1 << i) for i in range(3)}
_HEADERS |= {0xD9 + i: ("str", 1 << i) for i in range(3)}
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

    def is_chunked(self) -> bool:
        """Whether the map at this place is an array in chunks."""
        at = self.at
        is_array = self.header("map") > 0 and self.peek()[0] == "str" and self.small() == _CHUNKED
        self.at = at
        return is_array

    def skip(self) -> None:
        """Step over the object at this place, whatever it is. Raises ValueError where the file ends before it does."""
        left = 1
        while left:
            left -= 1
            kind, length, size = self._parse()
            if kind in ("map", "array"):
                self.at += size
                left += length * (2 if kind == "map" else 1)
            elif kind in ("bin", "ext", "str"):
                self.at += size + length
            else:
                self.small()
            if self.at > len(self.data) or left > len(self.data):
                raise ValueError("the file was cut short")

    def _parse(self) -> tuple[str, int, int]:
        first = self.data[self.at]
        if 0x80 <= first <= 0x8F:
            return "map", first & 0x0F, 1
        if 0x90 <= first <= 0x9F:
            return "array", first & 0x0F, 1
        if 0xA0 <= first <= 0xBF:
            return "str", first & 0x1F, 1
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4), 2
        if first not in _HEADERS:
            return f"byte 0x{first:02x}", 0, 1
        kind, width = _HEADERS[first]
        length = int.from_bytes(self.data[self.at + 1 : self.at + 1 + width], "big")
        return kind, length, 1 + width + (kind == "ext")
