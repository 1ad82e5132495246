"""Which raw objects the recipe's sources have, sorted by source and key, and the file that lists them."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines.dag.manifest import digest
from pipelines.decoder.client import parsed_records
from pipelines.decoder.content import Content
from pipelines.recipe import Kind, Recipe, Source
from storage.errors import UserError
from storage.store import Store
from storage.urls import join_url, list_objects
from tokenization.fields import field_names
from tokenization.media.frames import IMAGES, VIDEOS
from tokenization.readers.records import EXTENSIONS, KEYS, SideData, extension_of

OBJECTS = "objects.jsonl"

_KINDS: dict[Kind, frozenset[str]] = {
    "video": VIDEOS,
    "image": IMAGES,
    "text": frozenset(EXTENSIONS),
    "webdataset": frozenset({".tar"}),
}
_OF_RECORDS = tuple(one for one in EXTENSIONS if one not in (".txt", ".md"))
_CONTAINERS = (".tar", *_OF_RECORDS)


@dataclass(frozen=True)
class SourceObject:
    """One raw object: where it is, what it is, and its side data.

    key: unique within its split, `source/path below the pattern`. etag: changes when the content does.
    side: caption, question, answer, ... by key, for media. part: which share of a video this is, from start to end.
    media: the column in which the records of a file name their media. inner_heldout: globs over what a tar or a file of
    records holds: of it, this is what they match if held out, else what they do not match.
    """

    key: str
    source: str
    url: str
    size: int
    etag: str
    kind: Kind
    heldout: bool
    side: dict[str, Any]
    part: tuple[float, float] = (0.0, 1.0)
    media: str | None = None
    inner_heldout: tuple[str, ...] = ()
    media_from: tuple[str, ...] = ()


def list_sources(recipe: Recipe) -> list[SourceObject]:
    """All objects of the recipe's sources, sorted by source and key. Raises UserError where a pattern finds nothing."""
    objects: list[SourceObject] = []
    for name, source in sorted(recipe.sources.items()):
        found = {(found.key, found.heldout): found for found in _list_source(name, source, recipe)}
        objects += [found[key] for key in sorted(found)]
    return objects


def listing_digest(objects: Sequence[SourceObject]) -> dict[str, Any]:
    """Counts and a hash of a listing, by source: what identifies it in the `sources` stage's fingerprint."""
    by_source: dict[str, list[SourceObject]] = {}
    for found in objects:
        by_source.setdefault(found.source, []).append(found)
    return {
        name: {"objects": len(group), "bytes": sum(o.size for o in group), "digest": digest([_row(o) for o in group])}
        for name, group in by_source.items()
    }


def write_objects(store: Store, objects: Sequence[SourceObject]) -> None:
    """Commit the listing as `OBJECTS`."""
    with store.writing(OBJECTS) as file:
        for found in objects:
            file.write((json.dumps(_row(found), sort_keys=True) + "\n").encode())


def read_objects(store: Store) -> list[SourceObject]:
    """The listing that `write_objects` committed."""
    with store.open(OBJECTS) as file:
        rows = [json.loads(line) for line in file]
    tuples = ("part", "inner_heldout", "media_from")
    return [SourceObject(**{**row, **{name: tuple(row[name]) for name in tuples if name in row}}) for row in rows]


def _row(found: SourceObject) -> dict[str, Any]:
    """A line of the listing. What only some objects have is in no other's: a new key makes no run again without it."""
    row = asdict(found)
    if not found.media_from:
        del row["media_from"]
    return row


def _list_source(name: str, source: Source, recipe: Recipe) -> Iterator[SourceObject]:
    options = recipe.storage.options
    files = [info.url for glob in source.side for info in list_objects(join_url(recipe.storage.data, glob), options)]
    wanted = (*KEYS, *field_names(source.fields))
    side = SideData.load((file, parsed_records(Content(file, options), file, wanted)) for file in files)
    for pattern in source.urls:
        url = join_url(recipe.storage.data, pattern)
        for info in list_objects(url, options):
            key = f"{name}/{_below(info.url, url)}"
            heldout = any(fnmatch.fnmatch(info.url, glob) or fnmatch.fnmatch(key, glob) for glob in source.heldout)
            kind, about = _kind(info.url, name, source), side.get(info.url)
            whole = SourceObject(key, name, info.url, info.size, info.etag, kind, heldout, about, media=source.media)
            if kind == "records":
                whole = dataclasses.replace(whole, media_from=_media_from(source, recipe))
            if whole.kind in ("webdataset", "records") and not heldout:
                yield from _split_inside(whole, source)
            elif whole.kind == "video" and source.heldout_tail and not heldout:
                yield from _split(whole, 1 - source.heldout_tail)
            else:
                yield whole


def _media_from(source: Source, recipe: Recipe) -> tuple[str, ...]:
    """The prefixes that a source allows, relative ones below `storage.data`, and paths absolute on every machine."""
    urls = (join_url(recipe.storage.data, prefix) for prefix in source.media_from)
    return tuple(url if "://" in url else os.path.abspath(url) for url in urls)


def _split(video: SourceObject, share: float) -> Iterator[SourceObject]:
    """The first `share` of a video, and the rest of it, held out."""
    for start, end in ((0.0, share), (share, 1.0)):
        key = f"{video.key}@{start:g}-{end:g}"
        yield dataclasses.replace(video, key=key, part=(start, end), heldout=start > 0)


def _split_inside(container: SourceObject, source: Source) -> Iterator[SourceObject]:
    """A tar or a file of records once for training and, where globs hold out some of what is inside, once held out."""
    if source.heldout_tail:
        raise UserError(
            f"sources.{container.source}.heldout_tail: the tails of videos in {container.url} cannot be held out; name "
            f"what to hold out by globs in sources.{container.source}.heldout"
        )
    inner = tuple(glob for glob in source.heldout if not glob.lower().endswith(_CONTAINERS))
    yield dataclasses.replace(container, inner_heldout=inner)
    if inner:
        yield dataclasses.replace(container, inner_heldout=inner, heldout=True)


def _below(url: str, pattern: str) -> str:
    """The path of a URL below the last folder of a pattern before its first glob; its name where it is not there."""
    head = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    base = head[: head.rfind("/") + 1]
    return url[len(base) :] if url.startswith(base) else PurePosixPath(url).name


def _kind(url: str, name: str, source: Source) -> Kind:
    suffix = extension_of(url)
    if source.media is not None:
        if suffix in _OF_RECORDS:
            return "records"
        raise UserError(
            f"sources.{name}.media: {url} is no table; the records of JSONL, CSV, TSV and Parquet can name media"
        )
    if source.kind:
        return source.kind
    for kind, suffixes in _KINDS.items():
        if suffix in suffixes:
            return kind
    raise UserError(f"sources.{name}: cannot tell the kind of {url} by its extension; set sources.{name}.kind")
