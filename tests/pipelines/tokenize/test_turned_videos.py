"""What is trained on is there in its turns too, and its documents' frames may be several samples apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pydantic import ValidationError

from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.stage import TokenizeStage
from pipelines.tokenize.tokenize_task import tokenize
from storage.store import Store
from testing.tiny_run import VOCABULARY, tiny_recipe, write_clip
from tokenization.shards.document_parquet import read_documents


class Brightness:
    """In place of an encoder: of 4 x 4 cells each, how bright it is, from 0 to 15."""

    def __init__(self) -> None:
        self.encode = self

    def remote(self, boxed: list[Any], media: str) -> Any:
        frames = ray.get(boxed[0])
        cells = frames.reshape(len(frames), 4, 4, 4, 4, 3).mean(axis=(2, 4, 5))
        return ray.put(((cells // 16).astype(np.int32).reshape(len(frames), 16), "brightness"))


def recipe_of(folder: Path, source: dict[str, Any], tokenize: dict[str, Any]) -> Recipe:
    tree = tiny_recipe(folder).model_dump(mode="json")
    tree["sources"]["books"]["heldout"] = []
    tree["sources"]["clips"] |= {"heldout": [], "heldout_tail": 0.25, **source}
    tree["tokenize"] |= {"fps": 8, **tokenize}
    return Recipe.model_validate(tree)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_documents_of_a_turned_video_are_those_of_the_video_turned(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a text")
    write_clip(tmp_path / "data" / "a.mp4", speed=1)
    recipe = recipe_of(tmp_path, {"turns": ["mirrored", "quarter"]}, {"frames_per_document": 2, "frame_step": 3})
    parts = Partitions(list_sources(recipe), 1, {name: {} for name in recipe.sources})
    made: dict[bool, dict[str, tuple[np.ndarray, list[float]]]] = {}
    for part in (part for part in parts.values() if part.source == "clips"):
        store = Store(str(tmp_path / part.name))
        record = tokenize(part, TokenizeJob(recipe, VOCABULARY, 16), Brightness(), store)
        with store.open(record["file"]) as file:  # type: ignore[index]
            for one in read_documents(file):
                codes = one.tokens[VOCABULARY["vision"].contains(one.tokens)] - VOCABULARY["vision"].start
                grids = codes[codes < 16].reshape(-1, 4, 4)
                made.setdefault(part.heldout, {})[one.key] = (grids, one.provenance["frame_times"])
    video = next(iter(made[False])).split("#")[0]
    assert [key.removeprefix(video) for key in made[False]] == [
        f"{turn}#{start}" for turn in ("", "~mirrored", "~quarter") for start in (0, 1, 2, 6, 7, 8)
    ]
    assert all("~" not in key for key in made[True])
    for start in (0, 1, 2, 6, 7, 8):
        grids, times = made[False][f"{video}#{start}"]
        assert [round(8 * time) for time in times] == [start, start + 3]
        mirrored, quarter = (made[False][f"{video}~{turn}#{start}"][0] for turn in ("mirrored", "quarter"))
        assert (mirrored == grids[:, :, ::-1]).all()
        assert (quarter == np.rot90(grids, 1, axes=(1, 2))).all()
        assert len(np.unique(grids)) > 1


def test_turns_and_steps_change_what_is_made_and_none_leaves_it(tmp_path: Path) -> None:
    def settings(source: dict[str, Any], tokenize: dict[str, Any]) -> Any:
        stage = TokenizeStage(recipe_of(tmp_path, source, tokenize), None)
        return stage.settings(), stage.document_settings(None, 0)

    plain = settings({}, {"frames_per_document": 4})
    assert "turns" not in str(plain)
    assert "frame_step" not in str(plain)
    assert plain != settings({"turns": ["half"]}, {"frames_per_document": 4})
    assert plain != settings({}, {"frames_per_document": 4, "frame_step": 2})


def test_a_step_makes_fewer_frames_a_second_of_documents(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, {}, {"frames_per_document": 4}).tokenize.document_fps == 8
    assert recipe_of(tmp_path, {}, {"frames_per_document": 4, "frame_step": 4}).tokenize.document_fps == 2


def test_a_step_needs_documents_of_some_length(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"frame_step needs tokenize\.frames_per_document"):
        recipe_of(tmp_path, {}, {"frame_step": 2})
