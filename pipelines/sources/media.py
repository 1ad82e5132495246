"""The videos and images of a listed object (itself, the samples of a tar, or what its records name), and frames.

In: a listed object of any kind but text. Out: each `Medium` with its side data and its origin, in order, with a
`BadMedium` in place of one that cannot be used; or frames, for every stage that looks at raw pictures.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.decoder.client import decoded_frames, parsed_records, tar_samples
from pipelines.decoder.content import Content
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.sources.listing import SourceObject, content_of
from storage.errors import BadData, UserError
from storage.public_url import object_url, public_url, with_user
from storage.reach import PUBLIC_SCHEMES, Reach, scheme_and_place
from storage.urls import object_info
from tokenization.media.frame_sampling import FrameChunk, FrameRequest
from tokenization.media.kinds import MediaKind, kind_by_name
from tokenization.readers.record import BadRecord, NotText
from tokenization.readers.webdataset_tar import BadSample

# Where a record may point besides the place of its own file. fsspec has more schemes; some read scripts, or write.
_ELSEWHERE = frozenset({"http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "package"})
_MAX_SHARE = 64  # no medium of a tar or a file of records gives more than one part in so many of the frames asked for
_PERMANENT = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL}


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
    """A video or image, of a video a part. kind: None where only its bytes tell.

    identity: URL and etag of the object that holds the bytes, and which of the media in there; None where the object's
    store has neither a tag nor a time, so that nothing tells when they change.
    """

    origin: Origin
    kind: MediaKind | None
    content: Content
    part: tuple[float, float] = (0.0, 1.0)
    identity: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class BadMedium:
    """A medium that cannot be used, and why. With the object's own key: the object, or the rest of it."""

    origin: Origin
    reason: str


def media_of(
    found: SourceObject, options: dict[str, Any], columns: Sequence[str] = (), limits: Limits = DEFAULT_LIMITS
) -> Iterator[Medium | BadMedium]:
    """The media of one object that belong to its split, each to be used before the next is taken.

    columns: the fields that go with them. Raises OSError on what cannot be reached.
    """
    if found.kind == "webdataset":
        return _samples(found, options, columns, limits)
    if found.kind == "records":
        return _named(found, options, columns, limits)
    origin = Origin(found.key, None, found.side)
    kind: MediaKind = "image" if found.kind == "image" else "video"
    return iter([Medium(origin, kind, content_of(found, options), found.part, _identity(found.url, found.etag))])


def medium_frames(medium: Medium, request: FrameRequest, limits: Limits = DEFAULT_LIMITS) -> Iterator[FrameChunk]:
    """Frames uint8 [n, size, size, 3] of the medium's part of its video, with their times, a chunk at a time.

    Raises BadData on what cannot be decoded within the limits, OSError on what cannot be reached.
    """
    return decoded_frames(medium.content, medium.kind, replace(request, part=medium.part), limits)


def object_frames(
    found: SourceObject, options: dict[str, Any], request: FrameRequest, limits: Limits = DEFAULT_LIMITS
) -> Iterator[FrameChunk]:
    """Frames of a listed object, as of a medium; times are those in its medium.

    Of an object with many media, those of the first that can be decoded, until there are `request.max_frames`, each
    medium giving at most a share of them. Raises BadData on what cannot be decoded, OSError on what cannot be reached.
    """
    is_medium = found.kind in ("video", "image")
    count, room, max_frames = 0, request.max_frames, request.max_frames
    for medium in media_of(found, options, limits=limits):
        if isinstance(medium, BadMedium):
            continue
        if max_frames is not None and not is_medium:
            room = min(max(1, max_frames // _MAX_SHARE), max_frames - count)
        try:
            for frames in medium_frames(medium, replace(request, max_frames=room), limits):
                count += len(frames)
                yield frames
        except BadData:  # the tokenize stage puts it in quarantine
            if is_medium:
                raise
        if count == max_frames:
            return
    if not count and not is_medium:
        raise BadData("no video or image in it can be decoded")


def _samples(
    found: SourceObject, options: dict[str, Any], columns: Sequence[str], limits: Limits
) -> Iterator[Medium | BadMedium]:
    with content_of(found, options).opened() as file:
        try:
            for sample in tar_samples(Content(file=file), columns, limits):
                key = found.key if sample.key is None else f"{found.key}/{sample.key}"
                names = (key, f"{found.url}/{sample.key}") if sample.key is not None else ()
                if not _is_of_split(found, *names):
                    continue
                if isinstance(sample, BadSample):
                    yield BadMedium(Origin(key, sample.number), sample.reason)
                    continue
                side = {**found.side, **sample.side}
                where = {"sample": sample.key, "member": sample.member}
                content = Content(file=file, window=(sample.offset, sample.size))
                identity = _identity(found.url, found.etag, f"{sample.member}@{sample.offset}")
                yield Medium(Origin(key, sample.number, side, where), sample.kind, content, identity=identity)
        except BadData as error:
            if _is_of_split(found):
                yield BadMedium(Origin(found.key), str(error))


def _named(
    found: SourceObject, options: dict[str, Any], columns: Sequence[str], limits: Limits
) -> Iterator[Medium | BadMedium]:
    wanted = list(dict.fromkeys([found.media or "", *columns]))
    try:
        for record in parsed_records(content_of(found, options), found.url, wanted, limits):
            if isinstance(record, BadRecord):
                if _is_of_split(found):
                    yield BadMedium(Origin(f"{found.key}/{record.index}", record.index), record.reason)
            elif (medium := medium_of_record(found, *record, options)) is not None:
                yield medium
    except BadData as error:
        if _is_of_split(found):
            yield BadMedium(Origin(found.key), str(error))


def medium_of_record(
    found: SourceObject, number: int, fields: dict[str, Any], options: dict[str, Any]
) -> Medium | BadMedium | None:
    """The medium that a record of a file names in the column `found.media`; None if it belongs to the other split.

    number: of the record in its file. fields: of the record, from which that column is taken. Raises OSError on what
    cannot be reached.
    """
    key = f"{found.key}/{number}"
    named = fields.pop(found.media or "", None)
    if isinstance(named, bytes):
        if not _is_of_split(found, key, f"{found.url}/{number}"):
            return None
        origin, identity = Origin(key, number, {**found.side, **fields}), _identity(found.url, found.etag, f"#{number}")
        return Medium(origin, None, Content(file=io.BytesIO(named)), identity=identity)
    try:
        if not isinstance(named, str) or not named:
            held = named.type_name if isinstance(named, NotText) else type(named).__name__
            raise BadData(f'the record names no medium: its column "{found.media}" holds {held}')
        url = with_user(resolve(found.opening_url, named), found.opening_url)
    except BadData as error:
        return BadMedium(Origin(key, number), str(error)) if _is_of_split(found, key) else None
    shown, reach = public_url(url), Reach(found.opening_url, found.media_from)
    if not _is_of_split(found, key, f"{found.url}/{number}", shown, object_url(url)):
        return None
    try:
        etag = object_info(url, options, reach).etag
    except (FileNotFoundError, NotADirectoryError):
        reason = f"{shown}: no such object"
    except (BadData, UserError) as error:
        reason = str(error)
    except ValueError:
        reason = f"{shown}: not a URL that can be read"
    except OSError as error:
        if error.errno not in _PERMANENT:
            raise
        reason = f"{shown}: {error.strerror}"
    else:
        origin = Origin(key, number, {**found.side, **fields}, {"media": {"url": shown, "etag": etag}})
        content, identity = Content(url, options, reach=reach), _identity(object_url(url), etag)
        return Medium(origin, kind_by_name(url.partition("?")[0]), content, identity=identity)
    return BadMedium(Origin(key, number), reason)


def _identity(url: str, etag: str, member: str = "") -> tuple[str, str, str] | None:
    is_size_alone = etag.endswith("-")  # without a time, as `storage.urls` puts it
    return (url, etag, member) if etag and not is_size_alone else None


def _is_of_split(found: SourceObject, *names: str) -> bool:
    """Whether what has these names belongs to the object's split; damage, which has none, to that of training."""
    if not found.inner_heldout:
        return True
    return any(fnmatch.fnmatch(name, glob) for name in names for glob in found.inner_heldout) == found.heldout


def resolve(file_url: str, named: str) -> str:
    """The URL of what a record of the file at `file_url` names: absolute, or relative to that file.

    Whether it is within the file's reach is another question. Raises BadData on what no file must name: a path on this
    machine, where the file is elsewhere; a scheme that reads more than an object; a chain of file systems.
    """
    home, _, own_place = scheme_and_place(file_url)
    local = home in ("", "file")
    scheme, separator, place = scheme_and_place(named)
    scheme = scheme.lower()
    if scheme not in PUBLIC_SCHEMES and ("::" in named or "://" in scheme):
        raise BadData(f"{public_url(named)}: a chain of file systems is not read")
    if separator and scheme in _ELSEWHERE | ({"file"} if local else {home}):
        return f"{scheme}://{place}" if scheme in PUBLIC_SCHEMES | {"file"} else _inside(scheme, place)
    if separator:
        raise BadData(f"{public_url(named)}: the scheme {scheme!r} is not read from a record")
    if local:
        return posixpath.normpath(posixpath.join(posixpath.dirname(file_url.removeprefix("file://")), named))
    if named.startswith("/"):
        raise BadData(f"{public_url(named)}: a path of this machine, which a file from elsewhere does not choose")
    own_path = own_place.partition("?")[0] if home in PUBLIC_SCHEMES else own_place
    return _inside(home, posixpath.join(posixpath.dirname(own_path), named))


def _inside(scheme: str, place: str) -> str:
    """The URL with its `..` resolved, none of them above its bucket, host or package."""
    bucket, _, path = place.partition("/")
    return f"{scheme}://{bucket}{posixpath.normpath('/' + path)}"
