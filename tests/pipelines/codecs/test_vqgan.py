"""What a VQGAN is trained on is decoded as the recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.codecs.vqgan import _gather
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.media import object_frames
from testing.tiny_run import VQGAN_SIZES, tiny_recipe, write_clip


def test_the_frames_to_train_on_are_decoded_within_the_limits_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def decode(*arguments: Any) -> Iterator[Any]:
        limits.append(arguments[3:])
        return object_frames(*arguments)

    monkeypatch.setattr("pipelines.codecs.vqgan.object_frames", decode)
    (tmp_path / "data").mkdir()
    write_clip(tmp_path / "data" / "a.mp4", 1, 4)
    tree = tiny_recipe(tmp_path).model_dump(mode="json")
    tree["sources"] = {"clips": {"urls": ["*.mp4"], "fields": ["vision"]}}
    tree["train"]["stages"] = [{**tree["train"]["stages"][1], "mixture": {"clips": 1}}]
    tree["vqgan"] = {"config": VQGAN_SIZES, "train": {"steps": 1}}
    tree["tokenize"] |= {"decoder_memory_gib": 1.5, "decoder_cpu_seconds": 77}
    recipe = Recipe.model_validate(tree)
    with (tmp_path / "scratch").open("w+b") as scratch:
        frames, _ = _gather(recipe, list_sources(recipe), scratch)
        assert len(frames)
    assert limits == [(recipe.tokenize.decoder_limits,)]
