"""What tokens hold: runs of one modality, text as it reads, frames with their times and as the run's VQGAN shows them.

In: the tokens of a document or of a piece of one, with its provenance, and the stages behind them. What decodes them
lies in the run's own folders, so that neither the recipe nor its sources need be there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.codecs.record import CodecRecord
from pipelines.dag.manifest import StageOutput
from pipelines.tokenize.record import KeptTokenizer, TokenizeRecord
from storage.errors import UserError
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:  # it takes seconds to import, and texts do without
    from tokenization.codecs.vqgan.model import VQGAN


@dataclass(frozen=True)
class Frame:
    """number, time: in its document, seconds or None. inside: where its codes lie in the piece. whole: all of them."""

    number: int
    time: float | None
    inside: slice
    whole: bool


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one modality; of vision, its frames."""

    modality: str
    tokens: np.ndarray
    frames: tuple[Frame, ...] = ()


def pieces_of(tokens: np.ndarray, provenance: Mapping[str, Any], vocabulary: JointVocabulary) -> Iterator[Piece]:
    """The runs of one modality of a document, or of the piece of one, in turn."""
    numbers = np.searchsorted([one.stop for one in vocabulary.modalities], tokens, side="right")
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
    offset = provenance.get("document_range", [0])[0]
    for start, end in itertools.pairwise(edges):
        name = vocabulary.modalities[numbers[start]].name
        frames = _frames(start + offset, end + offset, provenance) if name == "vision" else ()
        yield Piece(name, tokens[start:end], tuple(frames))


def _frames(start: int, end: int, provenance: Mapping[str, Any]) -> Iterator[Frame]:
    """The frames in tokens start..end of the whole document, which lie in one of its streams."""
    (stream,) = (one for one in provenance["vision"] if one["start"] <= start and end <= one["end"])
    length = (stream["end"] - stream["start"]) // stream["frames"]  # codes and the mark of its end
    times = dict(enumerate(provenance.get("frame_times", ())))
    for number in range((start - stream["start"]) // length, -((stream["start"] - end) // length)):
        first = stream["start"] + number * length
        last = first + length - 1
        inside = slice(max(first, start) - start, min(last, end) - start)
        yield Frame(number, times.get(number), inside, start <= first and last <= end)


def tokenizer_of(tokenize: StageOutput[TokenizeRecord]) -> tuple[KeptTokenizer, TextTokenizer]:
    """The text tokenizer that lies beside the documents. Raises UserError where none was kept."""
    kept = tokenize.record.outputs.text_tokenizer
    if kept is None:
        raise UserError(f"{tokenize.store.path()}: made by a version that kept no tokenizer; run the recipe again")
    folder, _, name = kept.file.rpartition("/")
    return kept, load_text_tokenizer(str(tokenize.store.fetch_folder(folder) / name))


def codec_of(codec: StageOutput[CodecRecord]) -> VQGAN:
    """The run's VQGAN. Raises UserError where it is not there or not the one that made the codes."""
    from tokenization.codecs.vqgan.config import VQGANConfig
    from tokenization.codecs.vqgan.model import VQGAN

    outputs = codec.record.outputs
    weights = codec.store.fetch_folder(outputs.weights)
    vqgan = VQGAN.load(weights, VQGANConfig(**codec.manifest.declaration.settings["config"]))
    if vqgan.fingerprint != outputs.fingerprint:
        raise UserError(f"{weights}: not the weights that were committed; run the recipe again without this folder")
    return vqgan
