"""Some tensors of a safetensors file, each byte that is read held against a hash, without reading the rest.

The file's header carries the sha256 of every chunk of the bytes behind it (`__metadata__`, key "sha256"), and `COMMIT`
that of the header. So a rank that needs a few ranges of a file reads the header, and of the tensors the chunks that
those ranges touch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

CHUNK = 2**17
"""Bytes under one hash: a range costs up to two chunks more than itself, and a chunk 64 bytes of header."""
_PIECE = 2**23  # bytes read at a time; a multiple of CHUNK
_DIGITS = 64  # of a sha256 in hex


class ChangedError(Exception):
    """Bytes that are not those which were written."""


@dataclass(frozen=True)
class Header:
    """size: bytes of the header, behind which the tensors lie. start: of each tensor in the file, by name. hashes: of
    the chunks, in hex, one after another; "" where the file was hashed whole.
    """

    size: int
    start: Mapping[str, int]
    hashes: str


@dataclass(frozen=True)
class Wanted:
    """Bytes of a file from `start` on, to be put into `target`, fp32 [n]."""

    start: int
    target: Tensor

    @property
    def stop(self) -> int:
        """The first byte behind them."""
        return self.start + 4 * self.target.numel()


def chunk_hashes(data: memoryview) -> str:
    """Of the bytes behind a header: the sha256 of each chunk in hex, joined."""
    return "".join(hashlib.sha256(data[at : at + CHUNK]).hexdigest() for at in range(0, len(data), CHUNK))


def no_hashes(n_bytes: int) -> str:
    """As long as what `chunk_hashes` gives for so many bytes: to plan a header with."""
    return "0" * (_DIGITS * -(-n_bytes // CHUNK))


def read_header(file: BinaryIO, n_bytes: int, sha256: str) -> Header:
    """The first bytes of a file; raises ChangedError unless they have this sha256."""
    data = _read(file, 0, n_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ChangedError
    return _parsed(data)


def unhashed_header(file: BinaryIO) -> Header:
    """The header of a file that was hashed whole, as those written before format 3."""
    return _parsed(_read(file, 0, 8 + int.from_bytes(_read(file, 0, 8), "little")))


def _parsed(data: bytearray) -> Header:
    entries = json.loads(data[8:])
    metadata = entries.pop("__metadata__", {})
    start = {name: len(data) + entry["data_offsets"][0] for name, entry in entries.items()}
    return Header(len(data), start, metadata.get("sha256", ""))


def read_tensors(file: BinaryIO, header: Header, wanted: Sequence[Wanted]) -> None:
    """Read what is wanted into its place, in the chunks that hold any of it; raises ChangedError where one differs."""
    for first, last, ones in _stretches(wanted, header.size):
        for start in range(first, last, _PIECE):
            data = _read(file, start, min(_PIECE, last - start))
            _check(data, (start - header.size) // CHUNK, header.hashes)
            for one in ones:
                _copy(data, start, one)


def _stretches(wanted: Sequence[Wanted], base: int) -> Iterator[tuple[int, int, list[Wanted]]]:
    """The bytes from a chunk's beginning to a chunk's end that hold all that is wanted, each once, in order."""
    ones: list[Wanted] = []
    first = last = 0
    for one in sorted(wanted, key=lambda one: one.start):
        start = base + (one.start - base) // CHUNK * CHUNK
        stop = base - (base - one.stop) // CHUNK * CHUNK
        if ones and start > last:
            yield first, last, ones
            ones = []
        if not ones:
            first = last = start
        ones.append(one)
        last = max(last, stop)
    if ones:
        yield first, last, ones


def _check(data: bytearray, chunk: int, hashes: str) -> None:
    if hashes and chunk_hashes(memoryview(data)) != hashes[_DIGITS * chunk :][: _DIGITS * -(-len(data) // CHUNK)]:
        raise ChangedError


def _copy(data: bytearray, start: int, one: Wanted) -> None:
    """The part of what is wanted that lies in `data`, the bytes of the file from `start` on."""
    begin, end = max(start, one.start), min(start + len(data), one.stop)
    if begin < end:
        numbers = torch.frombuffer(data, dtype=torch.float32, count=(end - begin) // 4, offset=begin - start)
        place = (begin - one.start) // 4
        one.target[place : place + len(numbers)].copy_(numbers)


def _read(file: BinaryIO, start: int, n_bytes: int) -> bytearray:
    """So many bytes, fewer at the end of the file."""
    file.seek(start)
    data, got = bytearray(n_bytes), 0
    while got < n_bytes and (more := file.readinto(memoryview(data)[got:])):  # type: ignore[attr-defined]
        got += more
    return data[:got]
