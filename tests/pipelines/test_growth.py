"""Corpora that grow: what is there is encoded once, and what is added, removed or changed costs no more than itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.dag.manifest import StageOutput, read_manifest
from pipelines.pack.record import PackRecord
from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.tokenize.record import TokenizeFigures, TokenizeRecord, read_partitions
from testing.made_tars import write_tar
from testing.miniature import recipe
from testing.tiny_run import write_clip
from tests.pipelines.sources.media_listings import IMAGES
from tokenization.document import Document
from tokenization.shards.document_parquet import read_documents
from tokenization.shards.shard import read_sequence

pytestmark = pytest.mark.slow

CLIPS, FPS, SECONDS = 12, 4, 2
OF_A_CLIP = FPS * SECONDS


def lay_out(folder: Path) -> Path:
    """Clips with captions, and a tar of pictures with theirs."""
    folder.mkdir()
    for number in range(CLIPS):
        write_clip(folder / f"{number:02d}.mp4", 1 + number % 5, frames=16)
    captions = [{"file": f"{number:02d}.mp4", "caption": f"clip {number}"} for number in range(2 * CLIPS)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    members = {}
    for number, path in enumerate(IMAGES):
        members |= {f"{number}.jpg": path.read_bytes(), f"{number}.txt": b"an animal"}
    write_tar(folder / "pictures.tar", members)
    return folder


def tree(data: Path, sources: Path, root: Path) -> dict[str, Any]:
    made = recipe(sources, root)
    made["storage"] |= {"data": str(data), "codes": str(root.parent / "codes")}
    made["sources"] = {
        "clips": {"urls": ["*.mp4"], "fields": ["vision"], "side": ["captions.jsonl"]},
        "pictures": {"urls": ["*.tar"], "fields": ["[caption],vision"]},
    }
    made["tokenize"] = {"fps": FPS, "partition_bytes": 10_000}
    (stage,) = made["train"]["stages"][1:]
    made["train"]["stages"] = [stage | {"mixture": {"clips": 0.5, "pictures": 0.5}}]
    return made


Grow = Callable[..., "Made"]


class Made:
    """The tokenize and the pack stage of a run."""

    def __init__(self, made: dict[str, Any]) -> None:
        stages = _run_all_of(made)
        self.tokenize = _output(stages["tokenize"], TokenizeRecord)
        self.pack = _output(stages["pack-video"], PackRecord)

    @property
    def figures(self) -> TokenizeFigures:
        return self.tokenize.record.figures

    @property
    def files(self) -> set[str]:
        return {part.file for part in read_partitions(self.tokenize)}

    @property
    def documents(self) -> dict[str, Document]:
        made = {}
        for name in self.files:
            with self.tokenize.shared.open(name) as file:
                made |= {one.key: one for one in read_documents(file)}
        return made

    @property
    def packed(self) -> set[str]:
        """Keys of the documents in the shards that can be trained on."""
        keys = set()
        for source in self.pack.record.outputs.sets:
            shards = self.pack.record.read_set(self.pack.shared, source, "train")
            assert shards is not None
            for number in range(len(shards)):
                name, _, entry = shards.locate(number)
                with self.pack.shared.open(name) as file:
                    keys |= {one["key"].partition("@")[0] for one in read_sequence(file, entry).lineage}
        return keys


def _run_all_of(made: dict[str, Any]) -> dict[str, Any]:
    stages = [stage for stage in plan_recipe(Recipe.model_validate(made)) if stage.stage.lane == "data"]
    stages = [stage for stage in stages if stage.name in ("sources", "vqgan", "tokenize", "pack-video")]
    _run_all(stages)
    return {stage.name: stage.store for stage in stages}


def _output(store: Any, record: type[Any]) -> StageOutput[Any]:
    manifest = read_manifest(store, record)
    assert manifest is not None
    return StageOutput(store, manifest)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "data")


@pytest.fixture
def grow(local_ray: None, data: Path, sources: Path, tmp_path: Path) -> Grow:
    """Runs the recipe over what is there now, up to its shards; arguments change it."""

    def run(root: str = "run", change: Callable[[dict[str, Any]], object] = lambda made: None) -> Made:
        made = tree(data, sources, tmp_path / root)
        change(made)
        return Made(made)

    return run


def same(one: Document, other: Document) -> bool:
    return np.array_equal(one.tokens, other.tokens) and dict(one.provenance) == dict(other.provenance)


@pytest.mark.faults
def test_what_is_added_removed_or_changed_is_made_again_and_nothing_else(
    grow: Grow, data: Path, sources: Path, tmp_path: Path
) -> None:
    first = grow()
    assert first.figures.frames == first.figures.frames_encoded == CLIPS * OF_A_CLIP + len(IMAGES)
    before = first.documents

    write_clip(data / "more.mp4", 3)
    said = {
        stage.name: stage.notes for stage in plan_recipe(Recipe.model_validate(tree(data, sources, tmp_path / "run")))
    }
    assert said["sources"][0].startswith(f"1 of {CLIPS + 2} objects new, 0 changed, 0 gone since the listing of ")
    assert said["tokenize"][0].startswith("about a minute of ")
    grown = grow()
    assert (grown.figures.frames_encoded, grown.figures.documents) == (OF_A_CLIP, first.figures.documents + 1)
    assert grown.figures.partitions_made <= 2 < len(first.files)
    assert len(grown.files - first.files) <= 2
    after = grown.documents
    assert set(after) - set(before) == {"clips/more.mp4#0"}
    assert all(same(after[key], document) for key, document in before.items())
    assert "clips/more.mp4#0" in grown.packed

    (data / "03.mp4").unlink()
    write_clip(data / "05.mp4", 4)
    changed = grow()
    assert changed.figures.frames_encoded == OF_A_CLIP
    assert changed.figures.partitions_made <= 3
    assert set(after) - set(changed.documents) == {"clips/03.mp4#0"}
    assert not same(changed.documents["clips/05.mp4#0"], after["clips/05.mp4#0"])
    assert changed.packed == set(changed.documents)
    assert "clips/03.mp4#0" in grown.packed, "what an earlier run packed is still as it was"


def fields(made: dict[str, Any]) -> None:
    made["sources"]["clips"]["fields"] = ["[vision],caption"]


def window(made: dict[str, Any]) -> None:
    made["tokenize"]["frames_per_document"] = 3


def fewer(made: dict[str, Any]) -> None:
    made["sources"]["clips"]["max_frames"] = 5


def heldout(made: dict[str, Any]) -> None:
    made["sources"]["clips"] |= {"heldout": ["0[0-3].mp4"]}
    made["tokenize"]["partition_bytes"] = 20_000


def tail(made: dict[str, Any]) -> None:
    made["sources"]["clips"] |= {"heldout_tail": 0.4}


@pytest.mark.faults
def test_other_documents_of_the_same_media_encode_nothing(grow: Grow, data: Path) -> None:
    first = grow()
    for change in (fields, window, fewer, heldout, tail):
        made = grow(change=change)
        assert made.figures.frames_encoded == 0, change.__name__
        assert made.figures.partitions_made > 1
    captions = (data / "captions.jsonl").read_text().replace("clip 1", "a film")
    (data / "captions.jsonl").write_text(captions)
    for change in (fields, tail):
        assert grow(change=change).figures.frames_encoded == 0
    assert grow().documents.keys() == first.documents.keys()


@pytest.mark.faults
def test_another_rate_or_codec_finds_no_codes_and_all_lie_beside_each_other(grow: Grow, tmp_path: Path) -> None:
    first = grow()

    def faster(made: dict[str, Any]) -> None:
        made["tokenize"]["fps"] = 2 * FPS

    def precise(made: dict[str, Any]) -> None:
        made["vqgan"]["precision"] = "bf16"

    assert grow(change=faster).figures.frames_encoded == 2 * CLIPS * OF_A_CLIP + len(IMAGES)
    assert grow(change=precise).figures.frames_encoded == first.figures.frames
    assert len(list((tmp_path / "codes").glob("*/encoding.json"))) == 3
    assert grow("another run", change=faster).figures.frames_encoded == 0


@pytest.mark.faults
def test_codes_that_are_damaged_or_gone_are_made_again(grow: Grow, tmp_path: Path) -> None:
    first = grow()
    files = sorted((tmp_path / "codes").glob("*/data/*.parquet"))
    files[0].write_bytes(files[0].read_bytes()[:-50])
    files[1].unlink()
    again = grow(change=window)
    assert 0 < again.figures.frames_encoded < first.figures.frames
    assert grow(change=fields).figures.frames_encoded == 0
