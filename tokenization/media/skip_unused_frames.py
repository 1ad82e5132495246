"""Frames of a video that are neither sampled nor needed to decode others are not decoded.

In: the packets of a video, in order, and a function that tells whether a sample falls into an interval of time. Out:
the packets, with the decoder set for each. Only the decoder knows which frames others need: it is set to skip a packet
without such frames. All other frames are decoded to the same bits as ever; damage of skipped frames is not noticed.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

CODECS = frozenset({"h264", "hevc"})
_AHEAD = 8  # packets read ahead, which usually include the frame that is shown next
_REMEMBERED = 64  # timestamps; frames are reordered by 16 at most


def skip_unused(
    packets: Iterable[Packet], decoder: VideoCodecContext, is_used: Callable[[int, int], bool]
) -> Iterator[Packet]:
    """The packets, to be decoded one by one; `decoder` skips those whose frame is neither used nor needed by others.

    is_used(appears, goes): whether a sample falls between two timestamps, at which a frame is first shown and another
    has replaced it. A packet without a timestamp, or with no later timestamp read ahead, is decoded.
    """
    waiting: deque[Packet] = deque()
    stamps: list[int] = []

    def ready() -> Packet:
        packet = waiting.popleft()
        later = len(stamps) if packet.pts is None else bisect_right(stamps, packet.pts)
        unused = packet.pts is not None and later < len(stamps) and not is_used(packet.pts, stamps[later])
        decoder.skip_frame = "NONREF" if unused else "DEFAULT"
        return packet

    for packet in packets:
        if packet.pts is not None:
            insort(stamps, packet.pts)
            del stamps[:-_REMEMBERED]
        waiting.append(packet)
        if len(waiting) > _AHEAD:
            yield ready()
    while waiting:
        yield ready()
