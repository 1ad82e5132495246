"""`ringworld show` draws some of what a stage made, and says and shows what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.inspect.sample import _drawn
from testing.miniature import VQGAN_SIZES
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames

Show = Callable[..., str]


@pytest.fixture
def show(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    def call(stage: str, *words: object) -> str:
        assert main(["show", str(undisturbed), stage, *map(str, words)]) == 0
        return capsys.readouterr().out

    return call


def texts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


@pytest.mark.slow
def test_listed_objects_are_named_with_their_side_data(show: Show, sources: Path, tmp_path: Path) -> None:
    said = show("sources", "-n", 99, "--out", tmp_path)
    assert len(texts(tmp_path)) == 11
    assert f"acts/acts/held.md: text of {(sources / 'acts/held.md').stat().st_size:,} bytes, held out" in said
    assert f"{sources / 'clips/carphone.mp4'}\ncaption: a man talks in a car\n" in said


@pytest.mark.slow
def test_documents_are_shown_as_text_and_as_the_vqgan_shows_their_frames(
    show: Show, sources: Path, tmp_path: Path
) -> None:
    said = show("tokenize", "-n", 1000, "--out", tmp_path)
    with (sources / "clips/carphone.mp4").open("rb") as file:
        (chunk,) = media_frames(file, "video", FrameRequest(fps=12, size=32, chunk=64, max_frames=60))
    vqgan = VQGAN.load(sources / "vqgan", VQGANConfig(**VQGAN_SIZES))
    shown = vqgan.decode(vqgan.encode(chunk.frames[:3]))
    (path,) = (path for path in tmp_path.glob("*.png") if path.stem.endswith("carphone.mp4_0"))
    picture = np.asarray(Image.open(path))
    for number, frame in enumerate(shown):
        left = number * 34
        assert (picture[:, left : left + 32, :3] == frame).all()
        assert (picture[:, left : left + 32, 3] == 255).all()
    text = path.with_suffix(".txt").read_text()
    assert "3 frames, at 0 to 0.166667 s\n" in text
    assert f"url: {sources / 'clips/carphone.mp4'}\n" in text
    (act,) = (text for text in texts(tmp_path) if text.startswith("acts/acts/act-03.md#0"))
    assert (sources / "acts" / "act-03.md").read_text() in act
    assert "... (12,0" in said, "the terminal shows a beginning"


@pytest.mark.slow
def test_sequences_are_shown_with_their_documents_and_frames(show: Show, undisturbed: Path, tmp_path: Path) -> None:
    show("pack-video", "-n", 1000, "--out", tmp_path)
    (record,) = undisturbed.glob("stages/pack-video/*/manifest.json")
    found = texts(tmp_path)
    assert len(found) == json.loads(record.read_text())["figures"]["sequences"]
    of_clips = [text for text in found if text.startswith("clips-train")]
    assert all(" of 256 tokens filled by " in text and ", loss on " in text for text in found)
    assert any("\n0.." in text and '  "<vision>"\n  3 frames, at ' in text for text in of_clips)
    assert any(path.name.split("-", 1)[1].startswith("clips") for path in tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_seed_draws_the_same_and_another_others(show: Show, tmp_path: Path) -> None:
    def names(seed: int, folder: str) -> list[str]:
        show("pack-text", "-n", 5, "--seed", seed, "--out", tmp_path / folder)
        return [path.name for path in sorted((tmp_path / folder).iterdir())]

    assert len(names(0, "a")) == 5
    assert names(0, "a") == names(0, "b") != names(1, "c")


@pytest.mark.slow
def test_a_folder_of_its_own_is_named(show: Show) -> None:
    *_, path = (line.removeprefix("-> ") for line in show("pack-text", "-n", 1).splitlines() if line.startswith("->"))
    assert Path(path).parent.name.startswith("ringworld-show-")
    assert Path(path).exists()


@pytest.mark.slow
def test_what_cannot_be_shown_is_the_users_mistake(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in [
        ((undisturbed, "train-text"), "what train-text made is no sample of data; name sources, tokenize or a stage"),
        ((undisturbed, "packs"), "there is no stage packs; its stages are evaluate, pack-text, pack-video, report,"),
        ((tmp_path, "tokenize"), f"{tmp_path}: there is no stage tokenize; it is no run's root"),
        ((undisturbed, "tokenize", "-n", 0), "--number 0 is less than 1"),
        ((undisturbed, "tokenize", "--seed", -1), "--seed -1 is less than 0"),
        ((undisturbed, "sources", "--out", "none://b"), "none"),
    ]:
        assert main(["show", *map(str, words)]) == 2, words
        (sentence,) = capsys.readouterr().err.splitlines()
        assert said in sentence


def test_what_is_drawn_is_different_in_order_and_all_where_there_is_no_more() -> None:
    drawn = [(place, number) for place, numbers in _drawn([3, 0, 5], 4, 0) for number in numbers]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 4
    assert [*_drawn([3, 0, 2], 9, 0)] == [(0, [0, 1, 2]), (2, [0, 1])]
    assert [*_drawn([], 9, 0)] == [*_drawn([0, 0], 9, 0)] == []
