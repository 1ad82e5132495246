"""Makers of media that are small as files and large as pictures."""

from __future__ import annotations

import io
import zlib


def whole_png(side: int) -> bytes:
    """A PNG of side x side pixels in a file a thousandth of that."""
    return png_bomb(side, side).getvalue()


def png_bomb(side: int, rows: int = 1000) -> io.BytesIO:
    """A PNG that says it is of side x side pixels and has some rows of them, in a file a thousandth of that."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(min(side, rows))) + packer.flush()
    file = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        file += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    return io.BytesIO(file)
