"""What of an object is trained on and what is held out, where it is not all of it.

In: whole objects in columns. Out: those, with the tails of videos, and what globs hold out of tars and files of
records, as objects of their own.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from pipelines.recipe import Kind, Source
from pipelines.sources.listing import Listing, json_list
from storage.errors import UserError

WITH_INSIDES: frozenset[Kind] = frozenset({"webdataset", "records"})
"""Kinds of objects that hold media."""


def split(whole: Listing, source: Source, inner: tuple[str, ...]) -> Listing:
    """The objects of one source by split, in any order. inner: globs over what is inside of tars and files of records.

    Raises UserError where the tails of videos inside of others are to be held out.
    """
    kinds = np.array(whole.column("kind").indices)
    names = whole.column("kind").dictionary.to_pylist()
    free = np.array(pc.invert(whole.column("heldout")))
    holds = free & np.isin(kinds, [number for number, kind in enumerate(names) if kind in WITH_INSIDES])
    has_tail = free & np.isin(kinds, [number for number, kind in enumerate(names) if kind == "video"])
    has_tail &= source.heldout_tail > 0
    if not (holds.any() or has_tail.any()):
        return whole
    return Listing.joined(
        [
            whole.where(~holds & ~has_tail),
            *_inside(whole.where(holds), source, inner),
            *_tails(whole.where(has_tail), 1 - source.heldout_tail),
        ]
    )


def _inside(containers: Listing, source: Source, inner: tuple[str, ...]) -> list[Listing]:
    """Tars and files of records once for training and, where globs hold out some of what is inside, once held out."""
    if source.heldout_tail and len(containers):
        first = containers[0]
        raise UserError(
            f"sources.{first.source}.heldout_tail: the tails of videos in {first.url} cannot be held out; name "
            f"what to hold out by globs in sources.{first.source}.heldout"
        )
    trained_on = containers.with_values(inner_heldout=json_list(inner))
    return [trained_on, trained_on.with_values(heldout=True)] if inner else [trained_on]


def _tails(videos: Listing, share: float) -> list[Listing]:
    """The first `share` of each video, and the rest of it, held out."""
    parts = []
    for start, end in ((0.0, share), (share, 1.0)):
        keys = [f"{key}@{start:g}-{end:g}" for key in videos.column("key").to_pylist()]
        parts.append(videos.with_values(key=keys, start=start, end=end, heldout=start > 0))
    return parts
