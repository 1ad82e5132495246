"""The videos and images that a listed object holds: itself, the samples of a tar, or what its records name.

In: a listed object of any kind but text. Out: each `Medium` with its side data and where it is from, in order; one that
cannot be used is a `BadMedium` in its place.
"""

from __future__ import annotations

import errno
import fnmatch
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.decoder.client import Content
from pipelines.sources.listing import SourceObject
from storage.errors import BadData, UserError
from storage.urls import object_info, open_url, public_url
from tokenization.media.frames import MediaKind, kind_by_name
from tokenization.readers.records import BadRecord, read_records
from tokenization.readers.webdataset_tar import BadSample, read_samples

# Where a record may point besides the place of its own file. fsspec has more schemes; some read scripts, or write.
_ELSEWHERE = frozenset({"http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "package"})
_REFUSED = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL}  # today as tomorrow


@dataclass(frozen=True)
class Origin:
    """Where a medium is from. key: of the medium, unique in its split. number: of its record or sample in the object,
    None for the object itself. side: caption, question, answer, ... . provenance: what leads back to the bytes.
    """

    key: str
    number: int | None = None
    side: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Medium:
    """A video or image (kind None: its bytes tell), of a video its part."""

    origin: Origin
    kind: MediaKind | None
    content: Content
    part: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class BadMedium:
    """A medium that cannot be used, and why; with the object's own key, the (rest of the) object."""

    origin: Origin
    reason: str


def media_of(found: SourceObject, options: dict[str, Any]) -> Iterator[Medium | BadMedium]:
    """The media of one object that belong to its split. Raises OSError on what cannot be reached."""
    if found.kind == "webdataset":
        return _samples(found, options)
    if found.kind == "records":
        return _named(found, options)
    origin = Origin(found.key, None, found.side)
    kind: MediaKind = "image" if found.kind == "image" else "video"
    return iter([Medium(origin, kind, Content(found.url, options), found.part)])


def _samples(found: SourceObject, options: dict[str, Any]) -> Iterator[Medium | BadMedium]:
    def wanted(key: str) -> bool:
        return _is_of_split(found, f"{found.key}/{key}", f"{found.url}/{key}")

    with open_url(found.url, options) as file:
        for sample in read_samples(file, wanted):
            if isinstance(sample, BadSample) and sample.key is None:
                if not (found.heldout and found.inner_heldout):  # the other split tells of it
                    yield BadMedium(Origin(found.key, sample.number), sample.reason)
                continue
            key = f"{found.key}/{sample.key}"
            if isinstance(sample, BadSample):
                yield BadMedium(Origin(key, sample.number), sample.reason)
                continue
            side = {**found.side, **sample.side}
            where = {"sample": sample.key, "member": sample.member}
            content = Content(found.url, options, (sample.offset, sample.size), sample.held)
            yield Medium(Origin(key, sample.number, side, where), sample.kind, content)


def _named(found: SourceObject, options: dict[str, Any]) -> Iterator[Medium | BadMedium]:
    with open_url(found.url, options) as file:
        try:
            for record in read_records(file, found.url):
                if isinstance(record, BadRecord):
                    if not (found.heldout and found.inner_heldout):
                        yield BadMedium(Origin(f"{found.key}/{record.index}", record.index), record.reason)
                    continue
                medium = _of_record(found, *record, options)
                if medium is not None:
                    yield medium
        except BadData as error:
            if not (found.heldout and found.inner_heldout):
                yield BadMedium(Origin(found.key), str(error))


def _of_record(
    found: SourceObject, number: int, fields: dict[str, Any], options: dict[str, Any]
) -> Medium | BadMedium | None:
    """The medium that a record names; None if it belongs to the other split."""
    key = f"{found.key}/{number}"
    named = fields.get(found.media or "")
    try:
        if not isinstance(named, str) or not named:
            raise BadData(f'the record names no medium: its column "{found.media}" holds {type(named).__name__}')
        url = resolve(found.url, named)
    except BadData as error:
        return BadMedium(Origin(key, number), str(error)) if _is_of_split(found, key) else None
    if not _is_of_split(found, key, f"{found.url}/{number}", url):
        return None
    shown = public_url(url)
    try:
        etag = object_info(url, options).etag
    except (FileNotFoundError, NotADirectoryError):
        return BadMedium(Origin(key, number), f"{shown}: no such object")
    except UserError as error:
        return BadMedium(Origin(key, number), str(error))
    except ValueError:
        return BadMedium(Origin(key, number), f"{shown}: not a URL that can be read")
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return BadMedium(Origin(key, number), f"{shown}: {error.strerror}")
    side = {**found.side, **fields}
    where = {"media": {"url": shown, "etag": etag}}
    return Medium(Origin(key, number, side, where), kind_by_name(url.partition("?")[0]), Content(url, options))


def _is_of_split(found: SourceObject, *names: str) -> bool:
    if not found.inner_heldout:
        return True
    return any(fnmatch.fnmatch(name, glob) for name in names for glob in found.inner_heldout) == found.heldout


def resolve(file_url: str, named: str) -> str:
    """The URL of what a record of the file at `file_url` names: absolute, or relative to that file.

    Raises BadData on what a file must not name: one that is not on this machine, a path on this machine; a scheme that
    reads more than an object; a chain of file systems.
    """
    home, _, _ = file_url.rpartition("://")
    local = home in ("", "file")
    scheme, separator, place = named.rpartition("://")
    if "::" in named or "://" in scheme:
        raise BadData(f"{public_url(named)}: a chain of file systems is not read")
    if separator and scheme in _ELSEWHERE | ({"file"} if local else {home}):
        return _inside(scheme, place) if scheme == "package" else named
    if separator:
        raise BadData(f"{public_url(named)}: the scheme {scheme!r} is not read from a record")
    if local:
        return posixpath.normpath(posixpath.join(posixpath.dirname(file_url.removeprefix("file://")), named))
    if named.startswith("/"):
        raise BadData(f"{public_url(named)}: a path of this machine, which a file from elsewhere does not choose")
    path = file_url.rpartition("://")[2].partition("?")[0]
    return _inside(home, posixpath.join(posixpath.dirname(path), named))


def _inside(scheme: str, place: str) -> str:
    """The URL with its `..` resolved, none of them above its bucket, host or package."""
    bucket, _, path = place.partition("/")
    return f"{scheme}://{bucket}{posixpath.normpath('/' + path)}"
