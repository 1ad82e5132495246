"""Whether bytes are missing at the end of a video file, by what its container says of its own size.

In: the file, its format. Out: yes, no, or unknown. The length in the header tells less: in a screen recording the last
frame stands to the end, and a file may be cut behind its last whole frame.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from av.video.stream import VideoStream

_SEGMENT = 0x18538067
_MAX_BOXES = 1_000_000
_MAX_GIF = 1 << 28  # bytes that are looked through


def is_end_missing(file: BinaryIO, stream: VideoStream) -> bool | None:
    """Whether the file is shorter than its container says. None: the container does not say. Moves the position."""
    size = file.seek(0, io.SEEK_END)
    formats = stream.container.format.name.split(",")
    if "matroska" in formats:
        return _is_matroska_short(file, size)
    if "mov" in formats:
        return _is_mov_short(file, size, stream)
    if "avi" in formats:
        return _is_avi_short(file, size)
    if "gif" in formats:
        return _is_gif_short(file, size)
    if "mpegts" in formats:
        return _is_mpegts_short(file, size)
    return None


def _is_matroska_short(file: BinaryIO, size: int) -> bool:
    for number, _, end in _elements(file, size):
        if end is not None and end > size:
            return True
        if number == _SEGMENT and end is not None:
            return False
    return False  # a live recording, whose length was not known when its head was written, to its last whole block


def _elements(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int | None]]:
    """EBML elements (RFC 8794): number, begin and end of the body. One without an end is stepped into."""
    place = 0
    for _ in range(_MAX_BOXES):
        file.seek(place)
        head = file.read(16)
        if not head or not head[0]:
            return
        name_length = 9 - head[0].bit_length()
        if len(head) <= name_length or not head[name_length]:
            return
        size_length = 9 - head[name_length].bit_length()
        begin = place + name_length + size_length
        length = int.from_bytes(head[name_length : name_length + size_length]) & ((1 << 7 * size_length) - 1)
        end = None if length == (1 << 7 * size_length) - 1 else begin + length
        yield int.from_bytes(head[:name_length]), begin, end
        place = begin if end is None else end
        if place >= size:
            return


def _is_mov_short(file: BinaryIO, size: int, stream: VideoStream) -> bool | None:
    if len(stream.index_entries) and (last := stream.index_entries[-1]).pos + last.size > size:
        return True
    indexed = fragmented = False
    for name, begin, end in _boxes(file, size):
        if end > size:
            return True
        fragmented |= name == b"moof"
        if name == b"sidx":
            indexed = True
            if end + _referenced_bytes(file, begin) > size:
                return True
    return None if fragmented and not indexed else False


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of an ISO base media file: name, begin and end of the body."""
    place = 0
    for _ in range(_MAX_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return
        length, begin = int.from_bytes(head[:4]), place + 8
        if length == 1 and len(head) == 16:
            length, begin = int.from_bytes(head[8:]), place + 16
        end = size if length == 0 else place + max(length, 8)
        yield head[4:8], begin, end
        place = end
        if place >= size:
            return


def _referenced_bytes(file: BinaryIO, begin: int) -> int:
    """The bytes behind a segment index (ISO 14496-12, 8.16.3) that it refers to."""
    file.seek(begin)
    layout = struct.Struct(">QQHH" if any(file.read(12)[:1]) else ">IIHH")
    head = file.read(layout.size)
    if len(head) < layout.size:
        return 0
    _, offset, _, count = layout.unpack(head)
    references = file.read(12 * count)
    sizes = struct.iter_unpack(">III", references[: len(references) // 12 * 12])
    return offset + sum(size & 0x7FFFFFFF for size, _, _ in sizes)


def _is_avi_short(file: BinaryIO, size: int) -> bool | None:
    place, known = 0, None
    while place < size:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            break
        length = int.from_bytes(head[4:], "little")
        if not length:  # a recording that was never finished
            return None
        known, place = False, place + 8 + length + length % 2
    return True if known is False and place > size + 9 else known  # some writers count the RIFF header, or no padding


def _is_mpegts_short(file: BinaryIO, size: int) -> bool | None:
    """Whether it ends within a packet of 188 bytes, each of which begins with the same one (ISO 13818-1)."""
    rest = size % 188
    if not rest or size < 188:
        return None
    file.seek(size - rest - 188)
    end = file.read(189)
    return True if len(end) == 189 and end[0] == end[188] == 0x47 else None


def _is_gif_short(file: BinaryIO, size: int) -> bool | None:
    """By the blocks of the file (GIF89a); its last byte, the trailer, may be missing."""
    if size > _MAX_GIF:
        return None
    file.seek(0)
    content = file.read(size)
    place = 13 + _table_bytes(content[10:11])
    while place < len(content) and content[place] in b"\x21\x2c":
        place += 2 if content[place] == 0x21 else 11 + _table_bytes(content[place + 9 : place + 10])
        while place < len(content) and content[place]:
            place += 1 + content[place]
        place += 1
    return place > len(content)


def _table_bytes(flags: bytes) -> int:
    return 6 << (flags[0] & 7) if flags and flags[0] & 0x80 else 0
