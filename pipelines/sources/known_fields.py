"""Which fields the records of a source have, as far as that is cheap to know before anything runs.

In: the listed objects of one source. Out: the names of fields, and whether these are all that there can be. Of tables
a few files are looked at, of these the first rows or the header alone; of tars none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.decoder.client import known_columns
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.sources.listing import SourceObject, content_of
from storage.errors import BadData
from storage.public_url import without_query
from tokenization.readers.records import extension_of

_FILES = 3  # of a source that are looked at, its first and last among them


def known_fields(
    objects: Sequence[SourceObject], options: dict[str, Any], limits: Limits = DEFAULT_LIMITS
) -> tuple[set[str], bool]:
    """The fields of a source's records, and whether no record can have another. Raises OSError on a failed request."""
    known = {name for found in objects for name in found.side}
    media = [found for found in objects if found.kind != "text"]
    if media:
        known.add("vision")
    if any(_is_one_text(found) for found in objects if found.kind == "text"):
        known.add("text")
    files = [found for found in objects if found.kind in ("text", "records") and not _is_one_text(found)]
    looked_at = [files[number] for number in sorted({0, len(files) // 2, len(files) - 1})] if files else []
    all_known = len(looked_at) == len(files) and not any(found.kind == "webdataset" for found in objects)
    for found in looked_at:
        try:
            names, is_whole = known_columns(content_of(found, options), found.url, limits)
        except BadData:  # the tokenize stage puts it in quarantine
            names, is_whole = [], False
        known.update(names)
        all_known = all_known and is_whole
    return known, all_known


def _is_one_text(found: SourceObject) -> bool:
    """Whether the file is one record."""
    return extension_of(without_query(found.url)).startswith((".txt", ".md"))
