"""Some tensors of a safetensors file, each byte checked by a hash, without reading the rest.

The file's header carries the sha256 of every chunk of the bytes behind it (`__metadata__`, key "sha256"), and `COMMIT`
that of the header. So a rank reads the header, and the chunks that its ranges touch.
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
    """Bytes that differ from those that were written."""


@dataclass(frozen=True)
class Header:
    """size: of the header in bytes. start: first byte of each tensor in the file, by name. hashes: of the chunks, in
    hex, one after another; "" where the file was hashed whole.
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
    """Zeros of the length of `chunk_hashes` of `n_bytes`, for a header of the final length."""
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
    """Read these into their targets, by whole chunks; raises ChangedError where a chunk differs from its hash."""
    for first, last, members in _stretches(wanted, header.size):
        for start in range(first, last, _PIECE):
            data = _read(file, start, min(_PIECE, last - start))
            digit = _DIGITS * ((start - header.size) // CHUNK)
            expected = header.hashes[digit : digit + _DIGITS * -(-len(data) // CHUNK)]
            if header.hashes and chunk_hashes(memoryview(data)) != expected:
                raise ChangedError
            for one in members:
                begin, end = max(start, one.start), min(start + len(data), one.stop)
                if begin < end:
                    count, place = (end - begin) // 4, (begin - one.start) // 4
                    numbers = torch.frombuffer(data, dtype=torch.float32, count=count, offset=begin - start)
                    one.target[place : place + count].copy_(numbers)


def _stretches(wanted: Sequence[Wanted], base: int) -> Iterator[tuple[int, int, list[Wanted]]]:
    """Stretches of whole chunks that hold all that is wanted, in order: first byte, last byte, what lies in it."""
    members: list[Wanted] = []
    first = last = 0
    for one in sorted(wanted, key=lambda one: one.start):
        start = base + (one.start - base) // CHUNK * CHUNK
        stop = base - (base - one.stop) // CHUNK * CHUNK
        if members and start > last:
            yield first, last, members
            members = []
        if not members:
            first = last = start
        members.append(one)
        last = max(last, stop)
    if members:
        yield first, last, members


def _read(file: BinaryIO, start: int, n_bytes: int) -> bytearray:
    """`n_bytes` bytes, fewer at the end of the file."""
    file.seek(start)
    data, got = bytearray(n_bytes), 0
    while got < n_bytes and (more := file.readinto(memoryview(data)[got:])):  # type: ignore[attr-defined]
        got += more
    return data[:got]
