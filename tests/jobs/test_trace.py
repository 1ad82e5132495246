"""`ringworld trace` leads from a packed sequence back to its objects, frames and settings, and says what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.cli import main
from pipelines.inspect.content import pieces_of
from pipelines.inspect.trace import describe, find, object_now
from storage.printable import printable
from storage.store import Store
from testing.finished_stages import only_folder
from testing.miniature import VQGAN_SIZES, ringworld
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames
from tokenization.packing.examples import pieces
from tokenization.shards.set_files import read_set
from tokenization.vocabulary import JointVocabulary

Trace = Callable[..., Any]
VOCABULARY = JointVocabulary.for_codebook(100, 10)


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str]) -> Trace:
    def call(*words: object) -> Any:
        assert main(["trace", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def stage(root: Path, name: str) -> Path:
    return Path(only_folder(root, name).path())


def sequences(folder: Path, name: str) -> list[tuple[Path, str]]:
    """Shard and key of every sequence of a set."""
    shards = read_set(Store(str(folder.parent)), f"{folder.name}/sets/{name}.json")
    return [
        (folder.parent / shard, key) for shard, stats in zip(shards.names, shards.stats) for key in stats.index.keys
    ]


@pytest.mark.slow
def test_a_run_of_text_is_traced_to_the_characters_of_its_files(undisturbed: Path, sources: Path) -> None:
    """All pieces of all acts, put together by what the traces say, are the acts."""
    folder = stage(undisturbed, "pack-text")
    parts: dict[str, dict[int, str]] = {}
    for shard, key in sequences(folder, "acts-train"):
        for document in describe(find(str(shard), key))["documents"]:
            assert document["object"]["record"] == 0
            (content,) = document["content"]
            parts.setdefault(document["object"]["url"], {})[document["document_range"][0]] = content["text"]
    acts = sorted(path for path in (sources / "acts").iterdir() if path.name != "held.md")
    assert sorted(parts) == [str(path) for path in acts]
    for path in acts:
        pieces = [text for _, text in sorted(parts[str(path)].items())]
        whole = path.read_text()
        assert len(pieces) > 5
        assert sum(len(piece) for piece in pieces) == pytest.approx(len(whole), abs=2 * len(pieces))
        # A context may end inside a character; a piece alone shows a replacement character there.
        for piece in pieces:
            assert piece.strip("\ufffd") in whole


@pytest.mark.slow
def test_it_is_said_whether_an_object_has_changed_since(undisturbed: Path, sources: Path, trace: Trace) -> None:
    shard, key = sequences(stage(undisturbed, "pack-text"), "acts-train")[0]

    def now() -> str:
        found = trace(shard, key)["documents"][0]["object"]
        assert found["url"] == str(act)
        return found["now"]

    act = Path(trace(shard, key)["documents"][0]["object"]["url"])
    content = act.read_bytes()
    assert now() == "unchanged"
    try:
        act.write_bytes(content[::-1])
        assert now() == "changed since it was read"
        act.unlink()
        assert now() == "gone"
    finally:
        act.write_bytes(content)


def test_an_object_that_cannot_be_reached_is_not_called_changed() -> None:
    assert object_now("http://127.0.0.1:9/x.txt", "e").startswith("not known (")
    assert object_now("none://x.txt", "e").startswith("not known (none://x.txt: the scheme 'none' cannot be used")


@pytest.mark.slow
def test_frames_are_traced_to_their_times_and_come_back_as_the_vqgan_shows_them(
    undisturbed: Path, sources: Path, tmp_path: Path, trace: Trace
) -> None:
    shard, key = sequences(stage(undisturbed, "pack-video"), "clips-train")[0]
    found = trace(shard, key, "--out", tmp_path)
    with (sources / "clips/carphone.mp4").open("rb") as file:
        (chunk,) = media_frames(file, "video", FrameRequest(fps=12, size=32, chunk=64, max_frames=60))
    vqgan = VQGAN.load(sources / "vqgan", VQGANConfig(**VQGAN_SIZES))
    shown = vqgan.decode(vqgan.encode(chunk.frames))
    named = []
    for document in found["documents"]:
        assert document["object"]["url"] == str(sources / "clips/carphone.mp4")
        assert document["object"]["part"] == [0.0, 1.0]
        texts = [piece["text"] for piece in document["content"] if "text" in piece]
        assert texts[0] == "<vision>"
        assert (
            texts[-1] == {"vision": "</vision>", "vision,caption": "</vision>a man talks in a car"}[document["fields"]]
        )
        first = document["object"]["record"]
        frames = [frame for piece in document["content"] for frame in piece.get("frames", ())]
        assert [frame["number"] for frame in frames] == list(range(len(frames)))
        for frame in frames:
            assert frame["time"] == pytest.approx(chunk.times[first + frame["number"]], abs=1e-6)
            picture = np.asarray(Image.open(tmp_path / frame["file"]))
            assert (picture == shown[first + frame["number"]]).all()
            named.append(frame["file"])
    assert named
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(named)


@pytest.mark.slow
def test_the_settings_are_those_of_every_stage_before(undisturbed: Path, sources: Path, trace: Trace) -> None:
    folder = stage(undisturbed, "pack-video")
    shard, key = sequences(folder, "clips-heldout")[0]
    found = trace(shard, key)
    assert (found["key"], found["context"], found["objective"]) == (key, 256, "vision-text")
    assert set(found["stages"]) == {"pack-video", "tokenize", "vqgan", "sources"}
    for name, entry in found["stages"].items():
        manifest = json.loads((stage(undisturbed, name) / "manifest.json").read_text())
        assert entry["fingerprint"] == manifest["fingerprint"]
        assert entry["settings"] == manifest["settings"]
    assert found["stages"]["tokenize"]["settings"]["tokenize"]["fps"] == 12
    assert found["text_tokenizer"]["url"] == str(sources / "tokenizer.json")
    kept = stage(undisturbed, "tokenize") / found["text_tokenizer"]["file"]
    assert kept.read_bytes() == (sources / "tokenizer.json").read_bytes()
    assert len(found["vqgan"]["fingerprint"]) == 64


@pytest.mark.slow
def test_a_reader_is_told_in_words(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, key = sequences(stage(undisturbed, "pack-video"), "clips-train")[0]
    assert main(["trace", str(shard), key]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{key} in {shard}\n")
    assert "clips/carphone.mp4#" in said
    assert '  "<vision>"\n  frame 0 at ' in said


@pytest.mark.slow
def test_no_such_key_or_shard_is_the_users_mistake(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stage(undisturbed, "pack-text")
    shard, key = sequences(folder, "acts-train")[0]
    for words, said in [
        ((shard, "nothing"), f"{shard}: no sequence has the key nothing; its 16 keys run from {key} to "),
        ((folder.parent / "shards/none.tar", key), f"{folder.parent} made no such shard"),
        ((folder, key), "not a shard of a run's finished pack stage"),
        ((stage(undisturbed, "tokenize").parent / "shards/x.tar", key), "not a shard of a run's finished pack stage"),
        ((tmp_path / "x.tar", key), "not a shard of a run's finished pack stage"),
        (("none://b/stages/p/f/shards/x.tar", key), "none"),
    ]:
        assert main(["trace", *map(str, words)]) == 2, words
        (sentence,) = capsys.readouterr().err.splitlines()
        assert said in sentence
    done = ringworld("trace", shard, "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"ringworld: {shard}: no sequence has the key nothing; its 16 keys run from {key} to "
    )


@given(
    st.lists(st.one_of(st.integers(1, 5), st.integers(1, 4).map(lambda n: -n)), min_size=1, max_size=6),
    st.integers(2, 30),
)
def test_wherever_a_context_cuts_a_document_each_frame_is_told_by_number_and_whole_where_it_is(
    runs: list[int], context: int
) -> None:
    """runs: so many text tokens, or if negative so many frames of 4 codes."""
    parts, streams, place = [], [], 0
    for run in runs:
        text = np.full(max(run, 1), 7)
        frames = np.column_stack([np.full((max(-run, 0), 4), 103), np.full(max(-run, 0), VOCABULARY.eof_id)]).ravel()
        if run < 0:
            streams.append({"start": place + 1, "end": place + 1 + len(frames), "frames": -run})
        parts += [text, frames]
        place += len(text) + len(frames)
    tokens = np.concatenate(parts).astype(np.int32)
    times = [number / 4 for number in range(5)]
    codes: dict[tuple[int, int], int] = {}
    for _, offset, end in zip(*pieces(np.array([len(tokens)]), context)):
        provenance = {"vision": streams, "frame_times": times, "document_range": [int(offset), int(end)]}
        piece = tokens[offset:end]
        assert sum(len(one.tokens) for one in pieces_of(piece, provenance, VOCABULARY)) == len(piece)
        for one in pieces_of(piece, provenance, VOCABULARY):
            for frame in one.frames:
                assert frame.time == frame.number / 4
                own = one.tokens[frame.inside]
                assert (own == 103).all()
                assert frame.whole == (len(own) == 4)
                (stream,) = (n for n, s in enumerate(streams) if s["start"] <= offset + _start(piece, one) < s["end"])
                codes[stream, frame.number] = codes.get((stream, frame.number), 0) + len(own)
    assert codes == {(n, frame): 4 for n, s in enumerate(streams) for frame in range(s["frames"])}


def _start(piece: np.ndarray, one: Any) -> int:
    """Where a run of tokens, a view of a piece, lies in it."""
    return (one.tokens.ctypes.data - piece.ctypes.data) // piece.itemsize


def test_what_a_text_holds_is_printed_and_not_obeyed() -> None:
    assert printable("é\x1b[31m\n\x9b\ud800") == "é\\x1b[31m\\n\\x9b\\ud800"
