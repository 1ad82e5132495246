"""Which raw objects the recipe's sources have: found, named, told apart by kind and by split, with their side data."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipelines.decoder.client import parsed_records
from pipelines.decoder.content import Content
from pipelines.recipe import Kind, Recipe, Source
from pipelines.report.numbers import count_of
from pipelines.sources.found import Found, find_objects
from pipelines.sources.heldout_patterns import heldout_by, idle_names, inner_globs
from pipelines.sources.identity import Names, below, data_url
from pipelines.sources.listing import Listing, SourceObject
from storage.errors import UserError
from storage.printable import printable
from storage.public_url import object_url, public_below, without_query
from storage.urls import join_url
from tokenization.fields import field_names
from tokenization.media.kinds import IMAGES, VIDEOS
from tokenization.readers.records import EXTENSIONS, extension_of, is_one_record
from tokenization.readers.side_data import KEYS, SideData

log = logging.getLogger("ringworld")

_KINDS: dict[Kind, frozenset[str]] = {
    "video": VIDEOS,
    "image": IMAGES,
    "text": frozenset(EXTENSIONS),
    "webdataset": frozenset({".tar"}),
}
_OF_RECORDS = tuple(one for one in EXTENSIONS if not is_one_record(f"x{one}"))
_CONTAINERS = (".tar", *_OF_RECORDS)
_COMPRESSED_TARS = {".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"}
WITH_INSIDES = {"webdataset", "records"}
"""Kinds of objects that hold media."""


def list_sources(recipe: Recipe) -> Listing:
    """All objects of the recipe's sources, sorted by source and key. Raises UserError where a pattern finds nothing."""
    objects: list[SourceObject] = []
    for name, source in sorted(recipe.sources.items()):
        objects += sorted(_list_source(name, source, recipe), key=lambda found: (found.key, found.heldout))
    return Listing.of(objects)


def inner_patterns(recipe: Recipe, name: str) -> Mapping[str, str]:
    """The globs over what tars and files of records of a source hold, each with the pattern that it is from."""
    return inner_globs(recipe.sources[name], recipe.storage, _CONTAINERS)


def _list_source(name: str, source: Source, recipe: Recipe) -> Iterator[SourceObject]:
    key, storage = f"sources.{name}", recipe.storage
    listed = find_objects(f"{key}.urls", source.urls, storage, lambda url: _is_known(url, source))
    side = _side_data(f"{key}.side", source, recipe)
    names = _names(name, listed, recipe)
    kinds = [_kind(one.urls[0], name, source) for one in names]
    heldout = heldout_by(source, storage, names)
    inner = inner_patterns(recipe, name)
    unseen = set(inner.values()) if set(kinds) & WITH_INSIDES else set()
    for pattern in source.heldout:
        if pattern not in unseen:
            idle = idle_names(pattern, storage, names) if pattern in set().union(*heldout) else [pattern]
            if idle:
                raise UserError(_holds_nothing_out(key, public_below(storage.data, idle[0]), names))
    for found, called, kind, patterns in zip(listed, names, kinds, heldout, strict=True):
        info, url = found.info, called.urls[0]
        whole = SourceObject(
            called.keys[0],
            name,
            url,
            info.size,
            info.etag,
            kind,
            bool(patterns),
            next((row for one in called.urls if (row := side.get(one))), {}) if side else {},
            media=source.media,
            media_from=_media_from(source, recipe) if kind == "records" else (),
            opens=None if info.url == url else info.url,
            heldout_by=patterns,
        )
        if kind in WITH_INSIDES and not patterns:
            yield from _split_inside(whole, source, tuple(inner))
        elif kind == "video" and source.heldout_tail and not patterns:
            yield from _split(whole, 1 - source.heldout_tail)
        else:
            yield whole


def _names(name: str, listed: Sequence[Found], recipe: Recipe) -> list[Names]:
    """What each object is called. Its key has the query of a web address only where the rest names several objects."""
    data = data_url(recipe.storage)
    keys = [tuple(f"{name}/{below(data, without_query(url))}" for url in found.urls) for found in listed]
    counts = Counter(of_object[0] for of_object in keys)
    names = []
    for found, of_object in zip(listed, keys, strict=True):
        if counts[of_object[0]] > 1:
            of_object = tuple(f"{name}/{below(data, url)}" for url in found.urls)
        names.append(Names(found.urls, of_object))
    return names


def _holds_nothing_out(key: str, pattern: str, names: Sequence[Names]) -> str:
    end = pattern.rstrip("/").rpartition("/")[2].lower()
    near = next((one for one in names if end and end in one.keys[0].lower()), names[0])
    return (
        f"{key}.heldout: {printable(pattern)} names none of the {count_of(len(names), 'objects')}, so all would be "
        f"trained on; write it as {key}.urls is, or as a glob over whole URLs or keys, as of "
        f"{printable(near.keys[0])}, in the same letters"
    )


def _side_data(key: str, source: Source, recipe: Recipe) -> SideData | None:
    """The rows of the side files; of bad ones one line is logged."""
    if not source.side:
        return None
    files = [found.info.url for found in find_objects(key, source.side, recipe.storage, _is_table)]
    if other := next((url for url in files if not _is_table(url)), None):
        raise UserError(f"{key}: {object_url(other)} is no table; side data is read from {', '.join(_OF_RECORDS)}")
    wanted, limits = (*KEYS, *field_names(source.fields)), recipe.tokenize.decoder_limits
    side = SideData.load(
        (object_url(file), parsed_records(Content(file, recipe.storage.options), file, wanted, limits))
        for file in files
    )
    if side.bad:
        (url, first), count = side.bad[0], count_of(len(side.bad), "bad rows")
        log.warning(
            "%s: left out %s: first %s, %s; mend them, or their objects go without", key, count, url, first.reason
        )
    return side


def _is_table(url: str) -> bool:
    return extension_of(url) in _OF_RECORDS


def _is_known(url: str, source: Source) -> bool:
    """Whether the extension tells that a file of a folder is meant by the source."""
    suffix = extension_of(url)
    if source.media is not None:
        return _is_table(url)
    return any(suffix in suffixes for kind, suffixes in _KINDS.items() if source.kind in (None, kind))


def _media_from(source: Source, recipe: Recipe) -> tuple[str, ...]:
    """The prefixes that a source allows, relative ones below `storage.data`, and paths absolute on every machine."""
    urls = (join_url(recipe.storage.data, prefix) for prefix in source.media_from)
    return tuple(url if "://" in url else os.path.abspath(url) for url in urls)


def _split(video: SourceObject, share: float) -> Iterator[SourceObject]:
    """The first `share` of a video, and the rest of it, held out."""
    for start, end in ((0.0, share), (share, 1.0)):
        key = f"{video.key}@{start:g}-{end:g}"
        yield dataclasses.replace(video, key=key, part=(start, end), heldout=start > 0)


def _split_inside(container: SourceObject, source: Source, inner: tuple[str, ...]) -> Iterator[SourceObject]:
    """A tar or a file of records once for training and, where globs hold out some of what is inside, once held out."""
    if source.heldout_tail:
        raise UserError(
            f"sources.{container.source}.heldout_tail: the tails of videos in {container.url} cannot be held out; name "
            f"what to hold out by globs in sources.{container.source}.heldout"
        )
    yield dataclasses.replace(container, inner_heldout=inner)
    if inner:
        yield dataclasses.replace(container, inner_heldout=inner, heldout=True)


def _kind(url: str, name: str, source: Source) -> Kind:
    suffix = extension_of(url)
    if source.media is not None:
        if suffix in _OF_RECORDS:
            return "records"
        raise UserError(
            f"sources.{name}.media: {url} is no table; the records of JSONL, CSV, TSV and Parquet can name media"
        )
    if suffix in _COMPRESSED_TARS:
        raise UserError(f"sources.{name}: {url} is a compressed tar, which is not read; unpack it to a .tar")
    if source.kind == "text" and suffix not in EXTENSIONS:
        raise UserError(
            f"sources.{name}: text is read from {', '.join(EXTENSIONS)}, and {url} is none of these; rename it, or "
            f"leave it out"
        )
    if source.kind:
        return source.kind
    for kind, suffixes in _KINDS.items():
        if suffix in suffixes:
            return kind
    if url.startswith(("http://", "https://")) and not suffix:
        remedy = f"set sources.{name}.kind, or end the URL with / where it is that of a folder"
    else:
        remedy = f"set sources.{name}.kind to video, image or webdataset if it is that, or leave it out"
    raise UserError(f"sources.{name}: cannot tell the kind of {url} by its extension; {remedy}")
