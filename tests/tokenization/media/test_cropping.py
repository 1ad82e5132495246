"""What a container says is not shown of a picture is cut off; pixels are as wide as it, or else the codec, says."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from storage.errors import BadData
from testing.made_media import corners, encoded, quadrants, remuxed
from tokenization.media.cropping import Cropping
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.resize import SquareConverter
from tokenization.media.video import decode_frames

UPRIGHT = ["red", "green", "blue", "white"]


def frames(video: bytes) -> np.ndarray:
    return np.concatenate([c.frames for c in decode_frames(io.BytesIO(video), FrameRequest(fps=25, size=32))])


def clean_aperture(width: int, height: int, right: int, down: int) -> bytes:
    """A MOV of a picture in the lower right of a larger one, of which a clean aperture shows only the picture."""
    whole = np.zeros((96, 160, 3), dtype=np.uint8)
    whole[96 - 64 :, 160 - 64 :] = quadrants(64, 64)
    video = encoded([whole] * 2, codec="libx264", container="mov", pixels="yuv444p")
    entry = video.index(b"avc1", video.index(b"stsd")) - 4
    size = int.from_bytes(video[entry : entry + 4])
    box = struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    video = bytearray(video[: entry + size] + box + video[entry + size :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = video.index(name, 0 if name != b"avc1" else entry) - 4
        video[place : place + 4] = (int.from_bytes(video[place : place + 4]) + 40).to_bytes(4)
    return bytes(video)


@pytest.mark.parametrize("container", ["mov", "matroska"])
def test_only_the_clean_aperture_is_shown(container: str, tmp_path: Path) -> None:
    video = clean_aperture(64, 64, (160 - 64) // 2, (96 - 64) // 2)
    if container == "matroska":  # as its pixel crop
        (tmp_path / "clip.mov").write_bytes(video)
        video = remuxed(tmp_path / "clip.mov", container, tmp_path / "clip").read_bytes()
    assert corners(frames(video)[0]) == UPRIGHT
    assert frames(video).max(axis=-1).min() > 200, "nothing of what is around"


def test_a_change_of_the_pixels_aspect_midway_is_followed_where_the_container_has_none() -> None:
    # 64x64 pixels twice as wide as high show the middle half of the columns.
    narrow = np.zeros((64, 64, 3), dtype=np.uint8)
    narrow[:, 16:48] = quadrants(64, 64)[:, ::2]
    parts = [
        encoded([picture] * 5, codec="libx264", container="h264", pixels="yuv444p", aspect=aspect)
        for picture, aspect in ((quadrants(64, 64), Fraction(1)), (narrow, Fraction(2)))
    ]
    found = frames(b"".join(parts))
    assert len(found) == 10
    assert corners(found[0]) == corners(found[-1]) == UPRIGHT
    assert found[-1].max(axis=-1).min() > 150


def test_a_crop_that_leaves_nothing_is_bad_data() -> None:
    frame = av.VideoFrame.from_ndarray(np.zeros((16, 96), dtype=np.uint8), format="gray")
    assert SquareConverter(8)(frame, Fraction(1), Cropping(left=60)).shape == (8, 8, 3)
    with pytest.raises(BadData, match="nothing is to be shown"):
        SquareConverter(8)(frame, Fraction(1), Cropping(left=60, right=60))
