"""Files that gzip or zstd compressed, unpacked while they are read; of a cut file all that its bytes tell.

In: a binary file. Out: a function that reads what was compressed, some bytes at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from storage.errors import BadData

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""By the extension of the file's name."""

_PACKED = 1 << 16
_GZIP_PIECE = 1 << 20
_ZSTD_PIECE = 1 << 16  # the most that is lost before a cut, beside the block that is cut
_GZIP_STREAM = 16 + zlib.MAX_WBITS


def unpacked(file: BinaryIO, codec: str) -> Callable[[int], bytes]:
    """A function that reads at most so many bytes, none at the end, and raises BadData where damage or a cut is next.

    codec: one of `CODECS`.
    """
    pieces = _gzip(file) if codec == "gzip" else _zstd(file)
    held = b""

    def read(size: int) -> bytes:
        nonlocal held
        try:
            held = held or next(filter(None, pieces), b"")
        except (zlib.error, EOFError, pa.ArrowException, OSError) as error:
            raise BadData(f"its compression by {codec} is damaged ({error})") from None
        taken, held = held[:size], held[size:]
        return taken

    return read


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    """What streams one after another hold; zeros behind one, with which tapes and copies fill blocks, are no data.

    A piece waits for the next: damage is often found only after bytes that it has changed, by their checksum at the
    latest. What is there of a stream that is cut is not damaged.
    """
    packed = file.read(_PACKED)
    while packed:
        stream, waiting = zlib.decompressobj(_GZIP_STREAM), b""
        while not stream.eof:
            if not packed and not (packed := file.read(_PACKED)):
                yield waiting
                raise EOFError("it ends inside a stream")
            if piece := stream.decompress(packed, _GZIP_PIECE):
                yield waiting
                waiting = piece
            packed = stream.unconsumed_tail
        yield waiting
        packed = stream.unused_data.lstrip(b"\0")
        while not packed and (more := file.read(_PACKED)):
            packed = more.lstrip(b"\0")


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    while piece := stream.read(_ZSTD_PIECE):
        yield piece
