"""Frames of a video that nobody looks at and no other frame is made from: they need no decoding.

In: the packets of a video, in order, and a question: does anybody look at what is shown from this time to that? Out:
the packets, the decoder set for each. Only the decoder knows from which frames others are made; it is told to pass over
a packet if it holds none of these. So what is decoded is decoded as ever, to the last bit, and what is passed over may
be damaged without anybody noticing.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

CODECS = frozenset({"h264", "hevc"})
_AHEAD = 8  # packets, among which the frame that follows on the screen usually is
_REMEMBERED = 64  # timestamps; frames are reordered by 16 at most


def pass_over_unseen(
    packets: Iterable[Packet], decoder: VideoCodecContext, is_seen: Callable[[int, int], bool]
) -> Iterator[Packet]:
    """The packets, to be decoded one by one; `decoder` passes over those whose frame is neither seen nor needed.

    is_seen: of two timestamps, when a frame appears and when another is known to have replaced it. A packet without a
    timestamp, or with no later one in sight, is decoded.
    """
    waiting: deque[Packet] = deque()
    stamps: list[int] = []

    def ready() -> Packet:
        packet = waiting.popleft()
        later = len(stamps) if packet.pts is None else bisect_right(stamps, packet.pts)
        unseen = packet.pts is not None and later < len(stamps) and not is_seen(packet.pts, stamps[later])
        decoder.skip_frame = "NONREF" if unseen else "DEFAULT"
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
