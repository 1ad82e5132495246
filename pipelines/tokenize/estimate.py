"""How long the encoders will take for what is new in a listing, for the plan: as many frames a byte as there were in
what the run tokenized last, encoded as fast as it then encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from pipelines.dag.manifest import MANIFEST, is_fingerprint
from pipelines.recipe import Recipe
from pipelines.sources.listing import MEDIA
from pipelines.sources.listing_changes import ListingChanges
from storage.store import Store


def encoding_note(history: Store, changes: ListingChanges, recipe: Recipe) -> tuple[str, ...]:
    """A sentence; none where nothing new is to be encoded, or the run has encoded nothing yet.

    history: the folder of all that the run's tokenize stage has made.
    """
    fresh = [one.where_in("kind", MEDIA) for one in (changes.new, changes.changed)]
    size = sum(pc.sum(one.column("size")).as_py() or 0 for one in fresh)
    manifests = [history.at(name).read_json(MANIFEST) or {} for name in history.folders() if is_fingerprint(name)]
    encoded = [one for one in manifests if one.get("figures", {}).get("frames_encoded")]
    if not size or not encoded:
        return ()
    last = max(encoded, key=lambda one: str(one.get("finished", "")))
    figures, then = last["figures"], _bytes_of_media(last, recipe)
    if not then:
        return ()
    frames = size * figures["frames"] / then
    minutes = frames * last["seconds"] / figures["frames_encoded"] / 60
    workers = recipe.tokenize.encode.workers
    who = f"{workers} encoders" if workers > 1 else "one encoder"
    shown = f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    return (f"about {shown} of {who} for what is new, if that is as the rest and they are as fast as last time",)


def _bytes_of_media(manifest: Mapping[str, Any], recipe: Recipe) -> int:
    """Of the sources with vision, when a manifest was written."""
    sources = manifest.get("outputs", {}).get("made_of", {}).get("sources") or {}
    vision = [name for name, source in recipe.sources.items() if source.has_vision]
    return sum(sources[name]["bytes"] for name in vision if name in sources)
