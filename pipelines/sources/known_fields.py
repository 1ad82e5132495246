"""Which fields the records of a source have, as far as that is cheap to know before anything runs.

In: the listed objects of one source. Out: the names of fields, and how sure it is that there are no others. Of tables a
few files are looked at, of these the first rows or the header alone; of tars none.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from pipelines.decoder.client import known_columns
from pipelines.decoder.limits import Limits
from pipelines.sources.listing import Listing, content_of
from storage.errors import BadData
from tokenization.readers.records import is_one_record


class KnownFields(NamedTuple):
    """names: of the fields that were found. are_whole: whether no record of what was looked at has another. are_all:
    whether no record of the source has.
    """

    names: set[str]
    are_whole: bool
    are_all: bool


def known_fields(objects: Listing, options: dict[str, Any], limits: Limits) -> KnownFields:
    """The fields of a source's records. Raises OSError on a failed request."""
    kinds = set(objects.distinct("kind"))
    names = {name for side in filter(None, objects.column("side").to_pylist()) for name in json.loads(side)}
    if kinds != {"text"}:
        names.add("vision")
    readable = objects.where_in("kind", ["text", "records"])
    is_one = np.fromiter(map(is_one_record, readable.column("url").to_pylist()), bool, len(readable))
    files = readable.where(~is_one)
    if len(readable.where(is_one).where_in("kind", ["text"])):
        names.add("text")
    looked_at = [files[number] for number in sorted({0, len(files) // 2, len(files) - 1})] if files else []
    are_whole = "webdataset" not in kinds
    for found in looked_at:
        try:
            own, is_whole = known_columns(content_of(found, options), found.url, limits)
        except BadData:  # the tokenize stage puts it in quarantine
            own, is_whole = [], False
        names.update(own)
        are_whole = are_whole and is_whole
    return KnownFields(names, are_whole, are_whole and len(looked_at) == len(files))
