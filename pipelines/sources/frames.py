"""Frames of media and of listed objects: the one way in which every stage looks at raw pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.decoder.client import counted_samples, decoded_frames
from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, media_of
from storage.errors import BadData
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import FrameChunk

_MEDIA_TOLD_APART = 64  # of a tar or a file of records: no medium gives more than such a share of the frames asked for


def medium_frames(medium: Medium, request: FrameRequest, limits: Limits = DEFAULT_LIMITS) -> Iterator[FrameChunk]:
    """Frames uint8 [n, size, size, 3] of the medium's part of its video, with their times, a chunk at a time.

    limits: of the process that decodes. Raises BadData on what cannot be decoded within them, OSError on what cannot be
    reached.
    """
    return decoded_frames(medium.content, medium.kind, replace(request, part=medium.part), limits)


def count_frames(medium: Medium, fps: float, limits: Limits = DEFAULT_LIMITS) -> int:
    """How many samples a whole video has at `fps`, by a pass over its packets. Raises as `medium_frames` does."""
    return counted_samples(medium.content, fps, limits)


def object_frames(
    found: SourceObject, options: dict[str, Any], request: FrameRequest, limits: Limits = DEFAULT_LIMITS
) -> Iterator[FrameChunk]:
    """Frames of a listed object, as of a medium; times are those in its medium.

    Of an object with many media, those of the first that can be decoded, until there are `request.max_frames`, each
    medium giving at most a share of them. Raises BadData on what cannot be decoded, OSError on what cannot be reached.
    """
    media = media_of(found, options)
    if found.kind in ("video", "image"):
        for medium in media:
            assert isinstance(medium, Medium)
            yield from medium_frames(medium, request, limits)
        return
    count, max_frames = 0, request.max_frames
    share = None if max_frames is None else max(1, max_frames // _MEDIA_TOLD_APART)
    for medium in media:
        if isinstance(medium, BadMedium):
            continue
        room = None if max_frames is None or share is None else min(share, max_frames - count)
        try:
            for frames in medium_frames(medium, replace(request, max_frames=room), limits):
                count += len(frames)
                yield frames
        except BadData:  # the tokenize stage puts it in quarantine
            continue
        if count == max_frames:
            return
    if not count:
        raise BadData("no video or image in it can be decoded")
