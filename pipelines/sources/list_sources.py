"""Which raw objects the recipe's sources have: found, named, told apart by kind and by split, with their side data."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from pipelines.decoder.client import parsed_records
from pipelines.decoder.content import Content
from pipelines.recipe import Recipe, Source
from pipelines.recipe.data import FileKind
from pipelines.report.numbers import count_of
from pipelines.sources.found import Found, find_objects
from pipelines.sources.generated import generated_objects
from pipelines.sources.heldout_patterns import first_idle_name, heldout_by, inner_globs
from pipelines.sources.identity import Names, below, data_url
from pipelines.sources.listing import Listing, json_list
from pipelines.sources.splits import WITH_INSIDES, split
from storage.errors import UserError
from storage.printable import printable
from storage.public_url import object_url, public_below, without_query
from storage.urls import join_url
from tokenization.fields import field_names
from tokenization.generated.settings import Kind as Generated
from tokenization.generated.settings import Needles
from tokenization.media.kinds import IMAGES, VIDEOS
from tokenization.readers.records import EXTENSIONS, extension_of, is_one_record
from tokenization.readers.side_data import KEYS, SideData

log = logging.getLogger("ringworld")

_KINDS: dict[FileKind, frozenset[str]] = {
    "video": VIDEOS,
    "image": IMAGES,
    "text": frozenset(EXTENSIONS),
    "webdataset": frozenset({".tar"}),
}
_OF_RECORDS = tuple(one for one in EXTENSIONS if not is_one_record(f"x{one}"))
_CONTAINERS = (".tar", *_OF_RECORDS)
_COMPRESSED_TARS = {".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"}


def list_sources(recipe: Recipe) -> Listing:
    """All objects of the recipe's sources, sorted by source and key. Raises UserError where a pattern finds nothing."""
    listings = {name: _list_source(name, one, recipe) for name, one in recipe.sources.items() if one.generate is None}
    listings |= {
        name: _list_generated(name, one, one.generate, recipe, listings)
        for name, one in recipe.sources.items()
        if one.generate is not None
    }
    return Listing.joined([listings[name] for name in sorted(listings)])


def inner_patterns(recipe: Recipe, name: str) -> Mapping[str, str]:
    """The globs over what tars and files of records of a source hold, each with the pattern that it is from."""
    return inner_globs(recipe.sources[name], recipe.storage, _CONTAINERS)


def _list_source(name: str, source: Source, recipe: Recipe) -> Listing:
    found = find_objects(f"sources.{name}.urls", source.urls, recipe.storage, lambda url: _is_known(url, source))
    side = _side_data(f"sources.{name}.side", source, recipe)
    keys, kinds = _keys(name, found.urls, recipe), _kinds(name, found.urls, source)
    inner = inner_patterns(recipe, name)
    unseen = set(inner.values()) if _some_hold_media(kinds) else set()
    heldout = _heldout(name, recipe, _names(name, found, keys, recipe), unseen)
    whole = Listing.of_columns(
        key=keys,
        source=name,
        url=found.urls,
        size=found.sizes,
        etag=found.etags,
        kind=kinds,
        heldout=[number in heldout for number in range(len(found))],
        side=_side_column(found, side) if side else None,
        media=source.media,
        media_from=json_list(_media_from(source, recipe)) if source.media is not None else None,
        opens=[None if opens == url else opens for opens, url in zip(found.opens, found.urls, strict=True)],
        heldout_by=[json_list(heldout.get(number, ())) for number in range(len(found))],
    )
    return split(whole, source, tuple(inner)).in_order()


def _list_generated(
    name: str, source: Source, generate: Generated, recipe: Recipe, listings: Mapping[str, Listing]
) -> Listing:
    """The objects of a source that generates documents. listings: of the sources with files."""
    text = listings[generate.text] if isinstance(generate, Needles) else None
    objects = generated_objects(name, generate, text)
    urls, keys = objects.column("url").to_pylist(), objects.column("key").to_pylist()
    heldout = _heldout(name, recipe, Names([*urls, *keys], [*range(len(keys))] * 2), ())
    return objects.with_values(
        heldout=[number in heldout for number in range(len(keys))],
        heldout_by=[json_list(heldout.get(number, ())) for number in range(len(keys))],
    ).in_order()


def _keys(name: str, urls: Sequence[str], recipe: Recipe) -> list[str]:
    """The key of each object. It has the query of a web address only where the rest names several objects."""
    data = data_url(recipe.storage)
    keys = [f"{name}/{below(data, without_query(url))}" for url in urls]
    if len(set(keys)) == len(keys):
        return keys
    counts = Counter(keys)
    return [f"{name}/{below(data, url)}" if counts[key] > 1 else key for key, url in zip(keys, urls, strict=True)]


def _names(name: str, found: Found, keys: Sequence[str], recipe: Recipe) -> Names:
    """All that the objects are called."""
    data = data_url(recipe.storage)
    others = [(url, number) for number, urls in found.others.items() for url in urls]
    names = [*found.urls, *keys]
    names += [called for url, _ in others for called in (url, f"{name}/{below(data, without_query(url))}")]
    numbers = [*range(len(keys)), *range(len(keys)), *(number for _, number in others for _ in range(2))]
    return Names(names, numbers)


def _heldout(name: str, recipe: Recipe, names: Names, unseen: Collection[str]) -> Mapping[int, tuple[str, ...]]:
    """The patterns that hold out each object, by its number. unseen: patterns that may name what is inside of objects.

    Raises UserError where another pattern, or a name for which its braces stand, names no object.
    """
    source, storage = recipe.sources[name], recipe.storage
    heldout = heldout_by(source, storage, names)
    named = {pattern for patterns in heldout.values() for pattern in patterns}
    for pattern in source.heldout:
        if pattern not in unseen:
            idle = first_idle_name(pattern, storage, names) if pattern in named else pattern
            if idle is not None:
                raise UserError(_holds_nothing_out(f"sources.{name}", public_below(storage.data, idle), name, names))
    return heldout


def _holds_nothing_out(key: str, pattern: str, source: str, names: Names) -> str:
    end = pattern.rstrip("/").rpartition("/")[2].lower()
    keys = [name for name in names.names if name.startswith(f"{source}/")]
    near = next((one for one in keys if end and end in one.lower()), keys[0])
    return (
        f"{key}.heldout: {printable(pattern)} names none of the {count_of(names.objects, 'objects')}, so all would be "
        f"trained on; write it as {key}.urls is, or as a glob over whole URLs or keys, as of "
        f"{printable(near)}, in the same letters"
    )


def _side_data(key: str, source: Source, recipe: Recipe) -> SideData | None:
    """The rows of the side files; of bad ones one line is logged."""
    if not source.side:
        return None
    files = find_objects(key, source.side, recipe.storage, _is_table).opens
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


def _side_column(found: Found, side: SideData) -> list[str | None]:
    """The row of each object as JSON, by the first of its names that has one."""
    rows = map(side.row, found.urls)
    if not found.others:
        return list(rows)
    return [
        row or next(filter(None, map(side.row, found.others.get(number, ()))), None) for number, row in enumerate(rows)
    ]


def _some_hold_media(kinds: Sequence[FileKind]) -> bool:
    """Whether there are objects that hold media."""
    return not WITH_INSIDES.isdisjoint(kinds)


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


def _kinds(name: str, urls: Sequence[str], source: Source) -> list[FileKind]:
    """The kind of each object, which its extension tells."""
    by_extension: dict[str, FileKind] = {}
    kinds = []
    for url in urls:
        extension = extension_of(url)
        if extension not in by_extension:
            by_extension[extension] = _kind(url, name, source)
        kinds.append(by_extension[extension])
    return kinds


def _kind(url: str, name: str, source: Source) -> FileKind:
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
