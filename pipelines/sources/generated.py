"""The objects of a source that generates documents: ranges of document numbers, which no file has.

In: what the recipe says of the source and, where needles are hidden in text, the listing of that source. Out: a
`Listing`, made without reading anything. An object's etag is of all that decides its documents, so that a source grows,
and the text that it takes does, without touching what is made of the rest: only the last object, which is not full, is
another when there are more documents, and a new text is another only to the objects that draw it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from pipelines.dag.manifest import digest
from pipelines.recipe.base import output_settings
from pipelines.sources.listing import Listing
from storage.errors import UserError
from tokenization.generated.settings import Kind, Needles

GENERATED = "generated://"
"""How the URLs of such objects begin, which nothing opens."""
VERSION = 1
"""Of what is generated: raised when the same settings give other documents."""
TEXTS = 8
"""Objects of text that an object of needles draws."""
_BYTES = 4  # of a token


def generated_objects(name: str, settings: Kind, text: Listing | None) -> Listing:
    """The objects of a source, all of them trained on. text: the listing of the source in which needles are hidden.

    Raises UserError where that source has no text to train on.
    """
    step = settings.documents_per_object
    starts = np.arange(0, settings.documents, step)
    ends = np.minimum(starts + step, settings.documents)
    ranges = [f"{start:09d}-{end - 1:09d}" for start, end in zip(starts.tolist(), ends.tolist())]
    sides: list[dict[str, Any]] = [{"documents": [start, end]} for start, end in zip(starts.tolist(), ends.tolist())]
    if isinstance(settings, Needles):
        assert text is not None, "needles are hidden in the text of a source"
        for side, texts in zip(sides, _drawn(name, settings, text, starts)):
            side["texts"] = texts
    tag = digest([VERSION, output_settings(settings)])[:16]
    return Listing.of_columns(
        key=[f"{name}/{one}" for one in ranges],
        source=name,
        url=[f"{GENERATED}{name}/{one}" for one in ranges],
        size=[int(size) for size in (ends - starts) * settings.tokens[1] * _BYTES],
        etag=tag,
        kind="generated",
        heldout=False,
        side=[json.dumps(side, sort_keys=True) for side in sides],
    )


def _drawn(name: str, settings: Needles, listing: Listing, starts: np.ndarray) -> list[list[dict[str, str]]]:
    """For each object the objects of text that it draws, of those that are trained on.

    By consistent hashing (Karger et al. 1997): texts lie on a ring by their hashes, and each draw takes the one that
    follows a point, so that a new text replaces another only in the draws whose points are next before it.
    """
    texts = listing.of_split(False, ["text"])
    if not len(texts):
        raise UserError(
            f"sources.{name}.generate.text: the source {settings.text!r} has no text that is trained on; name one of "
            f"text files or tables, and narrow its heldout"
        )
    ring = np.array([_hash(f"text/{key}") for key in texts.column("key").to_pylist()], np.uint64)
    order = np.argsort(ring, kind="stable")
    points = [[_hash(f"{settings.seed}/{start}/{draw}") for draw in range(TEXTS)] for start in starts.tolist()]
    places = np.searchsorted(ring[order], np.array(points, np.uint64)) % len(ring)
    chosen = order[places]
    urls, etags = (texts.column(column) for column in ("url", "etag"))
    return [
        [{"url": urls[one].as_py(), "etag": etags[one].as_py()} for one in dict.fromkeys(row)]
        for row in chosen.tolist()
    ]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
