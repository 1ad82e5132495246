"""From when to when a video is shown, by its packets' timestamps and by the length that its header declares.

In: the packets, as they pass. Out: when the first frame appears and the last one goes.

**The end.** A file of which bytes are missing (`missing_end`) is cut off. Else the last frame is shown for its
duration, or, where the header declares a later end, until then, an hour at most: a screen recording has no frames while
nothing changes. Where the container does not tell its size, a video that ends over two seconds before its declared end
is cut off, unless there is sound up to it. That end is the stream's, or the file's where the stream is alone or has
none of its own; then it may be that of the sound, and the picture stands only if it is over two seconds later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import BinaryIO, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from storage.errors import BadData
from tokenization.media.missing_end import is_end_missing

LONGEST_STILL = 3600  # seconds between two frames; a longer gap is a broken clock, and would fill endless samples
MISSING_TAIL = 2  # seconds that a stream may end before a length that is not quite its own
_ROUNDING = Fraction(1, 10)  # seconds by which the frames of a whole stream may fall short of its own length


def frame_period(stream: VideoStream) -> Fraction:
    """Seconds of a frame without a duration of its own."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate and rate > 0 else Fraction(1, 25)


class Extent:
    """From when to when the packets that have passed are shown."""

    def __init__(self, stream: VideoStream) -> None:
        self._stream, self._tick = stream, Fraction(stream.time_base or 0)
        self._period = frame_period(stream) / self._tick if self._tick else Fraction(0)
        # In ticks of the stream's clock: this runs for every packet, and Fractions are slow.
        self._first: int | Fraction | None = None
        self._last: int | Fraction = 0
        self._until: int | Fraction = 0
        self._sound_until: dict[Stream, int] = {}

    @property
    def last(self) -> Fraction:
        """When the last frame appears, in seconds of the stream's clock."""
        return self._last * self._tick

    @property
    def frames_until(self) -> Fraction:
        """When the last frame has been shown for its duration, in seconds from the first."""
        return (self._until - (self._first or 0)) * self._tick

    def passed(self, container: InputContainer) -> Iterator[Packet]:
        """The packets of the stream, in order."""
        for packet in _demuxed(container, self._stream, *container.streams.audio):
            pts, duration, stream = packet.pts, packet.duration, packet.stream
            if stream is not self._stream:
                if pts is not None:
                    self._sound_until[stream] = max(self._sound_until.get(stream, pts), pts + (duration or 0))
                continue
            if packet.size and not packet.is_discard:
                begin = self._until if pts is None else pts
                self._first = begin if self._first is None else min(self._first, begin)
                self._last = max(self._last, begin)
                self._until = max(self._until, begin + (duration or self._period))
            yield packet

    def shown_until(self, file: BinaryIO) -> Fraction:
        """Seconds from the first frame at which the last one goes, once all packets have passed.

        That is after its duration; or at the end that the header declares, if nothing says that the file is cut off.
        Raises BadData if it is. Moves the file's position.
        """
        first, until = (self._first or 0) * self._tick, self.frames_until
        length, is_own = _declared_length(self._stream, first)
        missing = is_end_missing(file, self._stream)
        if missing is None and length - until > MISSING_TAIL:
            ends = (end * Fraction(stream.time_base or 0) for stream, end in self._sound_until.items())
            missing = length + first - max(ends, default=Fraction(0)) > MISSING_TAIL
        if missing:
            rest = f" of {float(length):.2f} s" if length > until else ", and bytes are missing behind"
            raise BadData(f"video cut off: it ends at {float(until):.2f} s{rest}")
        if length - until > LONGEST_STILL:
            raise BadData(f"video clock jumps by {float(length - until):.0f} s after its last frame")
        is_sure = is_own and missing is False
        return length if length - until > (_ROUNDING if is_sure else MISSING_TAIL) else until


def _demuxed(container: InputContainer, *streams: Stream) -> Iterator[Packet]:
    # PyAV raises IndexError behind the last packet where a stream has appeared in the middle, as in FLV and MPEG-PS.
    with suppress(IndexError):
        yield from container.demux(*streams)


def _declared_length(stream: VideoStream, first: Fraction) -> tuple[Fraction, bool]:
    """Seconds of video according to the file's header, 0 if it has none; and whether they are this stream's own.

    first: when its first frame is shown, which some containers count from.
    """
    container, own, start = cast(InputContainer, stream.container), Fraction(0), max(first, Fraction(0))
    alone = len(container.streams) == 1
    whole = Fraction(container.duration or 0, av.time_base) - start
    if stream.duration:
        own = stream.duration * Fraction(stream.time_base or 0)
    elif clock := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        # A tag of Matroska, which programs that cut films leave as it is.
        own = Fraction(clock[1]) * 3600 + Fraction(clock[2]) * 60 + Fraction(clock[3]) - start
        own = min(own, whole) if container.duration else own
    if alone:
        return max(own, whole), True
    return (own, own != whole) if own else (whole, False)
