"""Which fields the records of a source have, as far as that is cheap to know before anything runs.

In: the listed objects of one source. Out: the names of fields, and how sure it is that there are no others. Of tables a
few files are looked at, of these the first rows or the header alone; of tars none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipelines.decoder.client import known_columns
from pipelines.decoder.limits import Limits
from pipelines.sources.listing import SourceObject, content_of
from storage.errors import BadData
from tokenization.readers.records import is_one_record


class KnownFields(NamedTuple):
    """names: of the fields that were found. are_whole: whether no record of what was looked at has another. are_all:
    whether no record of the source has.
    """

    names: set[str]
    are_whole: bool
    are_all: bool


def known_fields(objects: Sequence[SourceObject], options: dict[str, Any], limits: Limits) -> KnownFields:
    """The fields of a source's records. Raises OSError on a failed request."""
    names = {name for found in objects for name in found.side}
    if any(found.kind != "text" for found in objects):
        names.add("vision")
    if any(found.kind == "text" and is_one_record(found.url) for found in objects):
        names.add("text")
    files = [found for found in objects if found.kind in ("text", "records") and not is_one_record(found.url)]
    looked_at = [files[number] for number in sorted({0, len(files) // 2, len(files) - 1})] if files else []
    are_whole = not any(found.kind == "webdataset" for found in objects)
    for found in looked_at:
        try:
            own, is_whole = known_columns(content_of(found, options), found.url, limits)
        except BadData:  # the tokenize stage puts it in quarantine
            own, is_whole = [], False
        names.update(own)
        are_whole = are_whole and is_whole
    return KnownFields(names, are_whole, are_whole and len(looked_at) == len(files))
