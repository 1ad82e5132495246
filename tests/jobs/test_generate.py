"""`ringworld generate` and `ringworld chat` of an exported model, as a user types them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from jobs.cli import main
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from storage.store import Store
from testing.committed_run import commit_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("generate")
    recipe, _ = commit_run(made / "tiny")
    export_model(find_trained(recipe.storage.root), Store(str(made / "model")))
    return str(made / "model")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_text_pictures_and_films_are_made_and_their_files_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("generate", "text", model, "the sea", "--max-new-tokens", "4")
    code, said, _ = run(capsys, *text)
    assert code == 0
    assert said.strip()
    assert json.loads(run(capsys, *text, "--json")[1]) == {"text": said.removesuffix("\n")}
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n"))
    assert run(capsys, "generate", "text", model, "-", "--max-new-tokens", "4")[1] == said
    out = str(tmp_path / "p.png")
    code, said, _ = run(capsys, "generate", "images", model, "the sea", "-n", "2", "--out", out)
    assert (code, said.split()) == (0, [str(tmp_path / "p-1.png"), str(tmp_path / "p-2.png")])
    assert Image.open(tmp_path / "p-2.png").size == (16, 16)
    code, said, _ = run(
        capsys, "generate", "video", model, "the sea", "--frames", "2", "--out", str(tmp_path / "f.gif")
    )
    assert (code, said.strip()) == (0, str(tmp_path / "f.gif"))
    continued = ("--continue", str(tmp_path / "f.gif"), "--given", "1", "--frames", "2")
    assert run(capsys, "generate", "video", model, *continued, "--out", str(tmp_path / "g.gif"))[0] == 0
    assert Image.open(tmp_path / "g.gif").n_frames == 3


def test_a_question_is_asked_once_or_in_a_conversation(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    shown = ("--media", str(tmp_path / "red.png"), "--max-new-tokens", "3")
    code, once, _ = run(capsys, "chat", model, "what is it?", *shown)
    assert (code, bool(once.strip())) == (0, True)
    lines = f"/show {tmp_path / 'red.png'}\nwhat is it?\n\nand then?\n/end\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, said, _ = run(capsys, "chat", model, "--max-new-tokens", "3")
    assert (code, len(said.splitlines()), said.splitlines()[0]) == (0, 2, once.strip())


def test_a_mistake_is_a_sentence_before_the_model_is_asked(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = {
        ("generate", "text", str(tmp_path), "x"): "no exported model is there",
        ("generate", "video", model, "--out", "a.mp4"): "neither a PROMPT nor --continue FILE",
        ("generate", "video", model, "x", "--out", "a.avi"): "films are written as",
        ("generate", "images", model, "x", "--out", "a.txt"): "pictures are written as",
        ("generate", "text", model, "x", "--temperature", "-1"): "temperature -1.0 is negative",
        ("chat", model, "x", "--media", "/nowhere.png"): "/nowhere.png: no such file or object",
    }
    for arguments, sentence in mistakes.items():
        code, _, said = run(capsys, *arguments)
        assert (code, sentence in said) == (2, True), said
        assert "Traceback" not in said
