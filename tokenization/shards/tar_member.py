"""Headers of a plain ustar archive with reproducible bytes, without an object for each.

In: the name and the size of a file. Out: what the archive holds before and behind it. Every field that could differ
between runs is fixed: owner 0, mode 0644, time 0. The bytes are those that `tarfile` writes, whose header of a new
`TarInfo` is the template: making each header anew would take as long as hashing 10,000 tokens.
"""

from __future__ import annotations

import functools
import tarfile

BLOCK = tarfile.BLOCKSIZE  # members and their headers begin at multiples of it

_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)  # POSIX.1-1988
_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[_CHECKSUM]) + 8 * ord(" ") - sum(_TEMPLATE[_SIZE])


def header(name: str, size: int) -> bytes:
    """The header block of a member. Raises ValueError on a name over 100 bytes or a body over 8 GiB."""
    encoded = name.encode("ascii")
    before, total, after = _around(size)
    if len(encoded) > 100:
        raise ValueError(f"no plain header for {size} bytes named {name}")
    return b"%b%b%06o\0 %b" % (encoded, before[len(encoded) :], total + sum(encoded), after)


@functools.lru_cache(maxsize=1024)  # the tensors of sequences are of few sizes
def _around(size: int) -> tuple[bytes, int, bytes]:
    """A header without a name: what comes before its checksum, the sum of its bytes, and what comes after it."""
    octal = b"%011o\0" % size
    if len(octal) > 12:
        raise ValueError(f"no plain header for {size} bytes")
    block = bytearray(_TEMPLATE)
    block[_SIZE] = octal
    return bytes(block[: _CHECKSUM.start]), _SUM + sum(octal), bytes(block[_CHECKSUM.stop :])


def padding(size: int) -> bytes:
    """What follows a body of `size` bytes, so that it ends with a block."""
    return bytes(-size % BLOCK)


def end(position: int) -> bytes:
    """What ends an archive whose members end at `position`: two blocks of zeros, then zeros to a whole record."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % tarfile.RECORDSIZE)
