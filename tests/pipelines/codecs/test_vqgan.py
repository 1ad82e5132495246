"""What a VQGAN is trained on is decoded as the recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.codecs.stage import CodecStage
from pipelines.codecs.vqgan import _gather
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.media import object_frames
from testing.tiny_run import VQGAN_SIZES, tiny_recipe, write_clip


def recipe_of(folder: Path, names: list[str], tokenize: dict[str, Any], **train: Any) -> Recipe:
    """Of clips with these names, on which a VQGAN is trained."""
    (folder / "data").mkdir(parents=True)
    for name in names:
        write_clip(folder / "data" / f"{name}.mp4", 1, 4)
    tree = tiny_recipe(folder).model_dump(mode="json")
    tree["sources"] = {"clips": {"urls": ["*.mp4"], "fields": ["vision"]}}
    tree["train"]["stages"] = [{**tree["train"]["stages"][1], "mixture": {"clips": 1}}]
    tree["vqgan"] = {"config": VQGAN_SIZES, "train": {"steps": 1, **train}}
    tree["tokenize"] |= tokenize
    return Recipe.model_validate(tree)


def test_of_more_objects_than_frames_some_are_drawn_and_no_other_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def decode(found: Any, *arguments: Any) -> Iterator[Any]:
        opened.append(found.key)
        return object_frames(found, *arguments)

    monkeypatch.setattr("pipelines.codecs.vqgan.object_frames", decode)
    recipe = recipe_of(tmp_path, list("abcdefgh"), {}, max_frames=3)
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        with (tmp_path / "scratch").open("w+b") as scratch:
            frames, weights = _gather(recipe.model_copy(update={"seed": seed}), list_sources(recipe), scratch)
        assert len(frames) == len(weights) == len(opened) == 3
        assert opened == sorted(opened)
        drawn.append(tuple(opened))
        opened.clear()
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_the_frames_to_train_on_are_decoded_within_the_limits_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def decode(*arguments: Any) -> Iterator[Any]:
        limits.append(arguments[3:])
        return object_frames(*arguments)

    monkeypatch.setattr("pipelines.codecs.vqgan.object_frames", decode)
    recipe = recipe_of(tmp_path, ["a"], {"decoder_memory_gib": 1.5, "decoder_cpu_seconds": 77})
    with (tmp_path / "scratch").open("w+b") as scratch:
        frames, _ = _gather(recipe, list_sources(recipe), scratch)
        assert len(frames)
    assert limits == [(recipe.tokenize.decoder_limits,)]


def test_further_losses_change_the_fingerprint_and_their_absence_leaves_it(tmp_path: Path) -> None:
    plain, perceptual = (
        CodecStage(recipe_of(tmp_path / name, ["a"], {}, **train)).settings()["train"]
        for name, train in (("plain", {}), ("perceptual", {"perceptual": 1.0}))
    )
    assert set(plain) == {"steps", "batch", "lr", "fps", "max_frames", "threads"}  # as before there were any
    assert perceptual == {**plain, "perceptual": 1.0}
