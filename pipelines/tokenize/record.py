"""What the tokenize stage commits: documents in the joint vocabulary, by partition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dag.manifest import StageOutput
from storage.store import Store


@dataclass(frozen=True, slots=True)
class TokenizedPartition:
    """file: Parquet of the documents, in the folder that the stage's fingerprints share; its sha256, as hex. heldout:
    whether they are kept from training.
    """

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
class CodesUsed:
    """Where the codes of the media were found and kept. encoding: its folder in the store. url: of the store, without
    secrets; None: that in the run's root.
    """

    encoding: str
    url: str | None = None


@dataclass(frozen=True)
class TokenizeOutputs:
    """partitions: the file that lists them; to format 2, themselves. files: sha256 by name. made_of: digests of the
    sources and fingerprints of what encoded them. codes: None where all is text.
    """

    partitions: str | tuple[TokenizedPartition, ...] = ()
    text_tokenizer: KeptTokenizer | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    made_of: Mapping[str, Any] = field(default_factory=dict)
    codes: CodesUsed | None = None


@dataclass(frozen=True)
class TokenizeFigures:
    """units: objects and records looked at, of which some are quarantined. thinned_videos: those that have more frames
    than max_frames, `frames_left_out` more in all. frames_encoded: of `frames`, those that the run that ended the stage
    found no codes of. partitions_made: those that it did not find made.
    """

    documents: int
    tokens: int
    vision_tokens: int = 0
    frames: int = 0
    units: int = 0
    quarantined: int = 0
    thinned_videos: int = 0
    frames_left_out: int = 0
    frames_encoded: int = 0
    partitions_made: int = 0


@dataclass(frozen=True)
class TokenizeRecord:
    """The stage's record."""

    outputs: TokenizeOutputs
    figures: TokenizeFigures


PARTITIONS = "partitions.parquet"


def write_partitions(store: Store, partitions: Sequence[TokenizedPartition]) -> None:
    """Commit the list of a stage's partitions, in order, as `PARTITIONS`."""
    columns = {entry.name: [getattr(part, entry.name) for part in partitions] for entry in fields(TokenizedPartition)}
    with store.writing(PARTITIONS) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def read_partitions(output: StageOutput[TokenizeRecord]) -> list[TokenizedPartition]:
    """The partitions of a finished stage, in order, with documents that `output.shared` has."""
    named = output.record.outputs.partitions
    if not isinstance(named, str):
        return list(named)
    with output.store.open(named) as file:
        table = pq.read_table(file, use_threads=False)
    columns = [table.column(entry.name).to_pylist() for entry in fields(TokenizedPartition)]
    return [TokenizedPartition(*row) for row in zip(*columns, strict=True)]
