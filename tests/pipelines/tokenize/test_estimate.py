"""What a plan says of the time that encoding what is new will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.dag.manifest import MANIFEST
from pipelines.recipe import Recipe
from pipelines.sources.listing import Listing, SourceObject
from pipelines.sources.listing_changes import ListingChanges
from pipelines.tokenize.estimate import encoding_note
from storage.store import Store
from testing.tiny_run import tiny_recipe


def clips(count: int, kind: Any = "video") -> Listing:
    return Listing.of(SourceObject(f"clips/{n}", "clips", f"/{n}", 1000, "e", kind, False, {}) for n in range(count))


@pytest.fixture
def history(tmp_path: Path) -> Store:
    """A run that has encoded half of its 4,000 frames in ten minutes; the other half it had found."""
    store = Store(str(tmp_path))
    figures = {"frames": 4000, "frames_encoded": 2000}
    made_of = {"sources": {"clips": {"bytes": 40_000}, "books": {"bytes": 10**9}}}
    last = {"figures": figures, "outputs": {"made_of": made_of}, "seconds": 600.0, "finished": "2026-02"}
    store.at("0" * 16).write_json(MANIFEST, last)
    found_all = {"figures": {"frames": 4000, "frames_encoded": 0}, "seconds": 1.0, "finished": "2026-03"}
    store.at("1" * 16).write_json(MANIFEST, found_all)
    return store


def test_as_many_frames_a_byte_take_as_long_as_they_took(history: Store, tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path).model_dump(mode="json")
    tree["tokenize"]["encode"] = {"workers": 8}
    recipe = Recipe.model_validate(tree)
    (said,) = encoding_note(history, ListingChanges(clips(15), clips(5), 3), recipe)
    assert said.startswith("about 10 minutes of 8 encoders for what is new"), "20,000 bytes are 2,000 frames"
    assert encoding_note(history, ListingChanges(clips(15, "text"), clips(0), 3), recipe) == ()
    assert encoding_note(Store(str(tmp_path / "none")), ListingChanges(clips(15), clips(0), 0), recipe) == ()
