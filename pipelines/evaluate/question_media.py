"""The media that questions are about: opened by the rules for media of a source, sampled evenly, turned into codes.

In: a question of a file. Out: codes of its frames, the same on every rank. Of several ranks each encodes its share.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.named_files import NamedFile
from pipelines.evaluate.subject import Subject
from pipelines.evaluate.tasks.question_lines import Question
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, medium_frames, medium_of_record
from storage.errors import BadData
from storage.urls import join_url
from tokenization.media.frame_sampling import FrameRequest

if TYPE_CHECKING:  # it imports torch, which a driver does without
    from tokenization.codecs.vqgan.model import VQGAN


def question_codes(
    job: EvaluateJob, file: NamedFile, question: Question, frames: int, media_from: Sequence[str]
) -> np.ndarray | None:
    """Codes int32 [at most `frames`, codes_per_frame] of a question's medium; None where it has none. Collective.

    Raises BadData where the medium is not there, cannot be decoded, or may not be named by the file; OSError where it
    cannot be reached.
    """
    if question.medium is None:
        return None
    kind, named = question.medium
    prefixes = (join_url(job.storage.data, prefix) for prefix in media_from)
    allowed = tuple(url if "://" in url else os.path.abspath(url) for url in prefixes)
    listed: dict[str, Any] = {"source": "questions", "size": 0, "kind": "records", "heldout": True, "side": {}}
    found = SourceObject(
        key=file.url, url=file.url, etag=file.etag, media=kind, media_from=allowed, opens=file.opens, **listed
    )
    medium = medium_of_record(found, question.line, {kind: named}, job.storage.options)
    assert medium is not None
    if isinstance(medium, BadMedium):
        raise BadData(medium.reason)
    assert job.subject.fps is not None
    size = codec_of(job.subject).config.resolution
    request = FrameRequest(fps=job.subject.fps, size=size, chunk=min(64, frames), max_frames=frames)
    chunks = [chunk.frames for chunk in medium_frames(replace(medium, kind=kind), request, job.limits)]
    if not chunks:
        raise BadData("it has no frame")
    return encoded(job, np.concatenate(chunks))


def encoded(job: EvaluateJob, frames: np.ndarray) -> np.ndarray:
    """Codes int32 [n, codes_per_frame] of frames uint8 [n, size, size, 3], which every rank gives alike. Collective."""
    import torch

    from model.attention.p2p import as_exchange
    from model.inference.gathering import gather

    exchange = as_exchange(job.group)
    codec = codec_of(job.subject)
    if exchange.size == 1:
        return codec.encode(frames)
    shares = np.array_split(np.arange(len(frames)), exchange.size)
    mine = torch.from_numpy(codec.encode(frames[shares[exchange.rank]])).to(job.device)
    return gather(mine, list(map(len, shares)), exchange).cpu().numpy()


def codec_of(subject: Subject) -> VQGAN:
    """The codec of a model, loaded once a process: one medium after another is encoded."""
    return _codec(_Identified((subject.name, subject.fingerprint, subject.device), subject))


@dataclass(frozen=True)
class _Identified:
    identity: tuple[str, ...]
    subject: Subject = field(compare=False)


@functools.lru_cache(maxsize=1)
def _codec(of: _Identified) -> VQGAN:
    return of.subject.codec()
