"""What the tokenize stage commits: documents in the joint vocabulary, by partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenizedPartition:
    """file: Parquet of the documents. heldout: whether they are kept from training."""

    partition: str
    source: str
    heldout: bool
    file: str
    documents: int
    tokens: int
    vision_tokens: int
    sha256: str = ""


@dataclass(frozen=True)
class KeptTokenizer:
    """The copy of the text tokenizer that lies beside the documents. url: where it came from, without secrets."""

    file: str
    url: str
    fingerprint: str


@dataclass(frozen=True)
class TokenizeOutputs:
    """files: sha256 by name. made_of: digests of the sources and fingerprints of what encoded them."""

    partitions: tuple[TokenizedPartition, ...] = ()
    text_tokenizer: KeptTokenizer | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    made_of: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizeFigures:
    """units: objects and records looked at, of which some are quarantined. thinned_videos: those that have more frames
    than max_frames, `frames_left_out` more in all.
    """

    documents: int
    tokens: int
    vision_tokens: int = 0
    frames: int = 0
    units: int = 0
    quarantined: int = 0
    thinned_videos: int = 0
    frames_left_out: int = 0


@dataclass(frozen=True)
class TokenizeRecord:
    """The stage's record."""

    outputs: TokenizeOutputs
    figures: TokenizeFigures
