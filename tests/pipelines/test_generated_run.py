"""Generated documents on the whole road of data: made, packed, looked at and traced; growing makes what is new."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipelines.dag.manifest import read_manifest
from pipelines.pack.record import PackRecord
from storage.store import Store
from testing.miniature import write_recipe
from testing.tiny_run import story
from tokenization.shards.set_files import read_set
from tokenization.shards.shard import read_sequence

pytestmark = pytest.mark.slow

CONTEXT = 512


def tree(folder: Path, documents: int) -> dict[str, Any]:
    needles = {"kind": "needles", "documents": documents, "tokens": [300, CONTEXT], "text": "plays", "needles": [1, 3]}
    spans = {"kind": "spans", "documents": 20, "tokens": [64, 64]}
    return {
        "name": "made",
        "storage": {"root": str(folder / "run"), "data": str(folder / "data")},
        "sources": {
            "plays": {"urls": ["*.txt"], "heldout": ["held.txt"]},
            "needles": {"generate": needles, "heldout": ["needles/000000000-*"]},
            "spans": {"generate": spans},
        },
        "pack": {
            "sequences_per_shard": 16,
            "stages": [
                {"name": "some", "context": CONTEXT, "objective": "text", "sources": ["needles", "spans"]},
            ],
        },
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, local_ray: None, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    (folder / "data").mkdir()
    for seed, name in enumerate(("a", "b", "held")):
        (folder / "data" / f"{name}.txt").write_text(story(seed))
    monkeypatch_module.setattr("tokenization.generated.settings.OBJECT_DOCUMENTS", 16)
    for documents in (40, 80):
        recipe = write_recipe(folder / "recipe.yaml", tree(folder, documents))
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["run", str(recipe), *(["--until", "tokenize"] if documents == 40 else [])]) == 0
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_more_documents_make_the_last_object_and_new_ones(run: Path) -> None:
    """Of 40 documents in objects of 16 the last is 8; with 80 that range is full, and two follow."""
    documents = [path.name for path in (run / "run/stages/tokenize/documents").glob("needles-*.parquet")]
    assert len(documents) == 3 + 3
    assert len([name for name in documents if name.startswith("needles-heldout-")]) == 1


def test_packed_documents_have_loss_on_their_answers_alone(run: Path) -> None:
    stage = Store(str(run / "run/stages/pack-some"))
    (folder,) = {path.parent.name for path in (run / "run/stages/pack-some").glob("*/sets")}
    manifest = read_manifest(stage.at(folder), PackRecord)
    assert manifest is not None
    of_source = {}
    for source in ("needles", "spans"):
        shards = read_set(stage, f"{folder}/sets/{source}-train.json")
        name, _, entry = shards.locate(0)
        with stage.open(name) as file:
            of_source[source] = read_sequence(file, entry)
    for sequence in of_source.values():
        share = (sequence.loss_weight > 0).mean()
        assert 0.005 < share < 0.25
    assert of_source["needles"].lineage[0]["provenance"]["generate"] == "needles"


def test_show_inspect_and_trace_say_what_was_generated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "run"
    assert main(["inspect", str(root), "--verify"]) == 0
    capsys.readouterr()
    assert main(["show", str(root), "sources", "-n", "20", "--out", str(run / "shown")]) == 0
    said = capsys.readouterr().out
    assert "needles/000000016-000000031: generated" in said
    assert "documents: [16, 32]" in said
    assert main(["show", str(root), "tokenize", "-n", "60", "--out", str(run / "shown")]) == 0
    said = capsys.readouterr().out
    assert "generate: needles" in said
    assert "generate: spans" in said
    shard = next(iter((root / "stages/pack-some/shards").glob("needles-train-*.tar")))
    assert main(["inspect", str(shard), "--json"]) == 0
    capsys.readouterr()
    with tarfile.open(shard) as tar:
        key = min(tar.getnames()).partition(".")[0]
    assert main(["trace", str(shard), key, "--json"]) == 0
    traced = json.loads(capsys.readouterr().out)
    found = traced["documents"][0]["object"]
    assert found["url"].startswith("generated://needles/")
    assert found["now"] == "unchanged"
    assert {Path(url).name for url in found["texts"]} <= {"a.txt", "b.txt"}
