"""A video of more than max_frames: where documents are windows of it no frame is lost, and what is thinned is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.stage import TokenizeStage
from pipelines.tokenize.tokenize_task import tokenize
from pipelines.tokenize.video_pieces import encode_piece
from storage.store import Store
from testing.tiny_run import VOCABULARY, tiny_recipe, write_clip
from tokenization.shards.document_parquet import read_documents

SECONDS, FPS = 10, 4


class Numbering:
    """Numbers frames in place of encoding them, in this process."""

    def __init__(self) -> None:
        self.encode = self

    def remote(self, boxed: list[Any], media: str) -> Any:
        return ray.put((np.zeros((len(ray.get(boxed[0])), 16), np.int32), "numbered"))


def recipe_of(folder: Path, source: dict[str, Any], tokenize: dict[str, Any]) -> Recipe:
    tree = tiny_recipe(folder).model_dump(mode="json")
    for one in tree["sources"].values():
        one["heldout"] = []
    tree["sources"]["clips"] |= source
    tree["tokenize"] |= {"fps": FPS, **tokenize}
    return Recipe.model_validate(tree)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("source", "settings", "numbers", "told"),
    [
        ({}, {"frames_per_document": 4, "max_frames": 9}, list(range(40)), (0, 0)),
        ({}, {"frames_per_document": 4, "max_frames": 9, "piece_seconds": 3}, list(range(40)), (0, 0)),
        ({}, {"max_frames": 9}, [0, 4, 9, 14, 19, 24, 29, 34, 39], (1, 31)),
        ({}, {"max_frames": 40}, list(range(40)), (0, 0)),
        ({"max_frames": 8}, {"frames_per_document": 4}, [0, 1, 2, 3, 36, 37, 38, 39], (1, 32)),
    ],
)
def test_windows_lose_no_frame_and_what_is_left_out_is_counted(
    tmp_path: Path,
    source: dict[str, Any],
    settings: dict[str, Any],
    numbers: list[int],
    told: tuple[int, int],
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a text")
    write_clip(tmp_path / "data" / "a.mp4", speed=1, frames=8 * SECONDS)
    recipe, store = recipe_of(tmp_path, source, settings), Store(str(tmp_path / "run"))
    parts = Partitions(list_sources(recipe), 1, {name: {} for name in recipe.sources})
    (part,) = [part for part in parts.values() if part.source == "clips"]
    job, pool = TokenizeJob(recipe, VOCABULARY, 16), Numbering()
    record = tokenize(part, job, pool, store)
    if not isinstance(record, dict):
        for piece in record.pieces:
            encode_piece(piece, job, pool, store)
        record = tokenize(part, job, pool, store)
    assert isinstance(record, dict)
    with store.open(record["file"]) as file:
        times = [document.provenance["frame_times"] for document in read_documents(file)]
    assert [round(time * FPS) for window in times for time in window] == numbers
    assert all(np.allclose(np.diff(window), 1 / FPS) for window in times) or "frames_per_document" not in settings
    assert (record["thinned_videos"], record["frames_left_out"]) == told


def test_the_plan_says_which_videos_are_thinned_and_how_many_were(tmp_path: Path) -> None:
    def notes(source: dict[str, Any], tokenize: dict[str, Any], figures: dict[str, Any] | None) -> tuple[str, ...]:
        return TokenizeStage(recipe_of(tmp_path, source, tokenize), None).notes(figures)

    assert notes({}, {}, None) == ("of source clips, videos of more than 225 s are thinned to 900 frames (max_frames)",)
    assert notes({}, {"frames_per_document": 12}, None) == ()
    assert notes({"max_frames": 60}, {"frames_per_document": 12}, None) == (
        "of source clips, videos of more than 15 s lose whole documents down to 60 frames (max_frames)",
    )
    assert notes({}, {}, {"thinned_videos": 2, "frames_left_out": 1500}) == (
        "2 videos thinned to max_frames: 1,500 frames left out",
    )
    assert notes({}, {}, {"frames": 9}) == ()
