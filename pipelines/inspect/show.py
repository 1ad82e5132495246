"""What a sample of a stage's output looks like, for `ringworld show`: lines of text, and pictures of its frames.

In: the URL of a run, a stage's name, how many, a seed. Out: a `Shown` for each object, document or packed sequence.
Texts are decoded by the tokenizer and frames by the VQGAN in the run's own folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.codecs.record import CodecRecord
from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import Manifest, StageOutput, read_manifest
from pipelines.inspect.content import Piece, codec_of, pieces_of, tokenizer_of
from pipelines.inspect.lineage import kind_of, stages_before
from pipelines.inspect.sample import last_output, some_documents, some_objects, some_sequences
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.report.numbers import count_of
from pipelines.sources.stage import SourcesRecord, SourcesStage
from pipelines.tokenize.record import TokenizeRecord
from pipelines.tokenize.stage import TokenizeStage
from storage.errors import BadData, UserError
from storage.store import Store
from storage.urls import first_contact
from tokenization.media.frame_sampling import uniform_sample
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:  # it takes seconds to import, and texts do without
    from tokenization.codecs.vqgan.model import VQGAN

COLUMNS = 8
"""Frames in a row of a picture."""
ROWS = 4
"""Rows of a picture at most: of a document, or of as many documents of a sequence."""


@dataclass(frozen=True)
class Shown:
    """name: of its files, without an extension. lines: texts among them are whole. picture: RGBA uint8 [h, w, 4]."""

    name: str
    lines: tuple[str, ...]
    picture: np.ndarray | None = None

    def save(self, folder: Store) -> list[str]:
        """Write NAME.txt and, with a picture, NAME.png, and return their paths."""
        from pipelines.evaluate.pictures import save_png

        names = [f"{self.name}.txt"]
        with first_contact(folder.url):
            with folder.writing(names[0]) as file:
                file.write("".join(f"{line}\n" for line in self.lines).encode("utf-8", "backslashreplace"))
            if self.picture is not None:
                names.append(save_png(folder, f"{self.name}.png", self.picture))
        return [folder.path(name) for name in names]


def show(run: str, stage: str, number: int, seed: int) -> Iterator[Shown]:
    """So many of what a stage made. Raises UserError where that is nothing to look at, is not done or is damaged."""
    home = last_output(Store(run.rstrip("/")), stage)
    kind = kind_of(home)
    if kind not in _KINDS:
        raise UserError(
            f"{home.path()}: what {stage} made is no sample of data; name {SourcesStage.kind}, {TokenizeStage.kind} or "
            f"a stage that packs, as {PackStage.named('NAME')}"
        )
    record, shown = _KINDS[kind]
    manifest: Manifest[Any] | None = read_manifest(home, record)
    assert manifest is not None, home
    try:
        yield from shown(StageOutput(home, manifest), number, seed)
    except (FileNotFoundError, BadData) as error:
        raise UserError(f"{home.path()}: damaged ({error}); `ringworld inspect --verify` says what of it is") from None


def _objects(output: StageOutput[SourcesRecord], number: int, seed: int) -> Iterator[Shown]:
    for count, found in enumerate(some_objects(output, number, seed)):
        part = "" if found.part == (0.0, 1.0) else f", of which this is {found.part[0]:g} to {found.part[1]:g}"
        lines = [f"{found.key}: {found.kind} of {found.size:,} bytes{part}, {_split(found.heldout)}", found.url]
        yield Shown(_name(count, found.key), (*lines, *_fields(found.side)))


def _documents(output: StageOutput[TokenizeRecord], number: int, seed: int) -> Iterator[Shown]:
    reader = _Reader(output, stages_before(output.store, output.manifest))
    for count, (part, document) in enumerate(some_documents(output, number, seed)):
        pieces = list(pieces_of(document.tokens, document.provenance, reader.vocabulary))
        share = _share(document.loss_mask)
        lines = [f"{document.key}: {len(document):,} tokens, loss on {share}, {_split(part.heldout)}"]
        lines += [*_fields(document.provenance, leave_out=("vision", "frame_times")), *reader.lines(pieces)]
        codes = _spread(_frame_codes(pieces), COLUMNS * ROWS)
        rows = [codes[start : start + COLUMNS] for start in range(0, len(codes), COLUMNS)]
        yield Shown(_name(count, document.key), tuple(lines), reader.picture(rows))


def _sequences(output: StageOutput[PackRecord], number: int, seed: int) -> Iterator[Shown]:
    stages = stages_before(output.store, output.manifest)
    reader = _Reader(stages[TokenizeStage.kind], stages)
    for count, (shard_set, shard, sequence) in enumerate(some_sequences(output, number, seed)):
        bounds, target = sequence.cu_seqlens.tolist(), sequence.loss_weight > 0
        filled = f"{bounds[sequence.n_examples]:,} of {shard_set.context:,} tokens"
        held = f"{filled} filled by {count_of(sequence.n_examples, 'documents')}"
        lines, rows = [f"{sequence.key} in {shard}: {held}, loss on {_share(target)}"], []
        for lineage, start, end in zip(sequence.lineage, bounds, bounds[1:]):
            pieces = list(pieces_of(sequence.tokens[start:end], lineage["provenance"], shard_set.vocabulary))
            share = _share(target[start:end])
            lines.append(f"{start}..{end}: {lineage['key']} of {lineage['source']}, loss on {share}")
            lines += [f"  {line}" for line in reader.lines(pieces)]
            if codes := _frame_codes(pieces):
                rows.append(_spread(codes, COLUMNS))
        yield Shown(_name(count, sequence.key), tuple(lines), reader.picture(rows[:ROWS]))


_KINDS: dict[str | None, tuple[type[Any], Callable[[StageOutput[Any], int, int], Iterator[Shown]]]] = {
    SourcesStage.kind: (SourcesRecord, _objects),
    TokenizeStage.kind: (TokenizeRecord, _documents),
    PackStage.kind: (PackRecord, _sequences),
}


class _Reader:
    """What reads tokens. tokenize: the stage that made them. stages: all before, by name."""

    def __init__(self, tokenize: StageOutput[TokenizeRecord], stages: Mapping[str, StageOutput[Any]]) -> None:
        _, self._tokenizer = tokenizer_of(tokenize)
        self._codec: StageOutput[CodecRecord] | None = stages.get(CodecStage.kind)

    @cached_property
    def vocabulary(self) -> JointVocabulary:
        """Of documents, whose own files do not have it."""
        special = {"bos_id": self._tokenizer.bos_id, "eos_id": self._tokenizer.eos_id}
        if self._codec is None:
            return JointVocabulary.of_text(self._tokenizer.size, **special)
        codes = self._codec.manifest.declaration.settings["config"]["codebook_size"]
        return JointVocabulary.for_codebook(self._tokenizer.size, codes, **special)

    def lines(self, pieces: Sequence[Piece]) -> Iterator[str]:
        """A line for each run of tokens of one modality."""
        for piece in pieces:
            if piece.modality == "text":
                yield f'"{self._tokenizer.decode(piece.tokens)}"'
            elif piece.frames:
                times = [frame.time for frame in piece.frames if frame.time is not None]
                when = f", at {times[0]:g} to {times[-1]:g} s" if times else ""
                n_cut = sum(not frame.whole for frame in piece.frames)
                cut = f", {n_cut} of them cut by the sequence's edge" if n_cut else ""
                yield f"{len(piece.frames)} frames{when}{cut}"
            else:
                yield f"{len(piece.tokens)} tokens of {piece.modality}"

    def picture(self, rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray | None:
        """The frames of these ids [codes] side by side, a row below the other: uint8 [h, w, 4]. None without any."""
        if self._codec is None or not rows:
            return None
        from pipelines.evaluate.pictures import strip

        vision = self.vocabulary["vision"]
        frames = self._vqgan.decode(vision.ids_to_codes(np.stack([ids for row in rows for ids in row])))
        return strip(np.split(frames, np.cumsum([len(row) for row in rows])[:-1]))

    @cached_property
    def _vqgan(self) -> VQGAN:
        assert self._codec is not None
        return codec_of(self._codec)


def _frame_codes(pieces: Sequence[Piece]) -> list[np.ndarray]:
    """The ids of the codes of all whole frames, in turn."""
    return [piece.tokens[frame.inside] for piece in pieces for frame in piece.frames if frame.whole]


def _spread(frames: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    return [frames[place] for place in uniform_sample(len(frames), most)]


def _fields(fields: Mapping[str, Any], leave_out: Sequence[str] = ()) -> Iterator[str]:
    for name, value in fields.items():
        if name not in leave_out:
            yield f"{name}: {value if isinstance(value, str) else json.dumps(value)}"


def _share(target: np.ndarray) -> str:
    n_targets = int(np.count_nonzero(target))
    return f"{n_targets:,} ({n_targets / max(1, len(target)):.0%})"


def _split(heldout: bool) -> str:
    return "held out" if heldout else "trained on"


def _name(count: int, key: str) -> str:
    return f"{count + 1:03}-{re.sub(r'[^A-Za-z0-9._-]+', '_', key)[-60:]}"
