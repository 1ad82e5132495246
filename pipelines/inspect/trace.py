"""Where a packed sequence comes from, for `ringworld trace`: back from a shard to objects, frames and settings.

In: the URL of a shard inside a run's folder, and a key. Out: plain JSON: the objects, records and frame times of each
of its documents, the settings and fingerprints of all stages behind it, its tokens as text; its frames as PNG files.
All is found from the run's manifests: the objects themselves need not be there any more. Where they are, it is said
whether they have changed since.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import MANIFEST, Declaration, Manifest, PlainRecord, StageOutput, read_manifest
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.sources.stage import SourcesStage
from pipelines.tokenize.record import KeptTokenizer, TokenizeRecord
from pipelines.tokenize.stage import TokenizeStage
from storage.errors import BadData, UserError
from storage.store import Store
from storage.urls import first_contact, object_info
from tokenization.document import PackedSequence
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import read_sequence
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

_FRAMES_AT_ONCE = 64
_OBJECT = ("url", "etag", "part", "record", "sample", "member", "media")


@dataclass(frozen=True)
class Traced:
    """A sequence with its shard's URL. stages: folder and manifest of the stage that packed it and of all before it."""

    shard: str
    sequence: PackedSequence
    vocabulary: JointVocabulary
    objective: str
    pack: str
    stages: dict[str, StageOutput[Any]]

    def of_kind(self, kind: str) -> StageOutput[Any] | None:
        """The stage of this kind, if one is behind the sequence."""
        return next((one for one in self.stages.values() if one.manifest.declaration.kind == kind), None)


def find(url: str, key: str) -> Traced:
    """The sequence with this key of a shard. Raises UserError if it is no shard of a run or has no such key."""
    folder, _, name = url.rstrip("/").rpartition("/")
    home, _, shards = folder.rpartition("/")
    store = Store(home)
    manifest = None
    if shards == "shards" and name.endswith(".tar"):
        with first_contact(url):
            manifest = read_manifest(store, PackRecord) if _kind(store) == PackStage.kind else None
    if manifest is None:
        place = "stages/pack-NAME/FINGERPRINT/shards/SHARD.tar"
        raise UserError(
            f"{url}: not a shard of a run's finished pack stage; give the path of one, which ends in {place}"
        )
    shard_set, stats = _shard(store, manifest, f"{shards}/{name}", url)
    if key not in stats.index.keys:
        keys = f"its {len(stats.index)} keys run from {stats.index.keys[0]} to {stats.index.keys[-1]}"
        raise UserError(f"{url}: no sequence has the key {key}; {keys}")
    try:
        with store.open(f"{shards}/{name}") as file:
            sequence = read_sequence(file, stats.index[stats.index.keys.index(key)])
    except (FileNotFoundError, BadData) as error:
        missing = isinstance(error, FileNotFoundError)
        raise UserError(f"{url}: {'there is no such file' if missing else error}; pack it again") from None
    name = manifest.declaration.stage
    stages = {name: StageOutput(store, manifest), **_before(store, manifest)}
    return Traced(url, sequence, shard_set.vocabulary, shard_set.objective, name, stages)


def describe(traced: Traced) -> dict[str, Any]:
    """All that is known of the sequence, plain JSON; `documents` in the order of its tokens."""
    sequence, tokenize, codec = traced.sequence, traced.of_kind(TokenizeStage.kind), traced.of_kind(CodecStage.kind)
    assert tokenize is not None, "documents are tokenized"
    kept, tokenizer = _tokenizer(tokenize)
    boundaries = sequence.cu_seqlens.tolist()
    now = functools.cache(object_now)
    documents = []
    for number, lineage in enumerate(sequence.lineage):
        (start, end), provenance = boundaries[number : number + 2], lineage["provenance"]
        pieces = _pieces(sequence.tokens[start:end], provenance, traced.vocabulary)
        documents.append(
            {
                "key": lineage["key"],
                "source": lineage["source"],
                "tokens": [start, end],
                "document_range": provenance.get("document_range", [0, end - start]),
                "object": _object(provenance, now),
                "fields": provenance.get("fields"),
                "content": [_plain(piece, tokenizer) for piece in pieces],
            }
        )
    return {
        "shard": traced.shard,
        "key": sequence.key,
        "stage": traced.pack,
        "context": len(sequence.tokens),
        "filled": boundaries[sequence.n_examples],
        "objective": traced.objective,
        "documents": documents,
        "stages": {
            name: {
                "fingerprint": output.manifest.fingerprint,
                "folder": output.store.path(),
                "settings": output.manifest.declaration.settings,
            }
            for name, output in traced.stages.items()
        },
        "text_tokenizer": asdict(kept),
        "vqgan": {"fingerprint": codec.record.outputs.fingerprint} if codec else None,
    }


def save_frames(traced: Traced, description: dict[str, Any], folder: str) -> list[str]:
    """Decode all whole frames to PNG files in a folder, name each in the description, and return the names.

    Raises UserError if the run's VQGAN is not there or not the one that made the codes.
    """
    from pipelines.evaluate.pictures import save_png
    from tokenization.codecs.vqgan.config import VQGANConfig
    from tokenization.codecs.vqgan.model import VQGAN

    codec = traced.of_kind(CodecStage.kind)
    if codec is None:
        raise UserError(f"{traced.shard}: the run has no VQGAN, so there is no frame to decode; leave out --out")
    outputs = codec.record.outputs
    weights = codec.store.fetch_folder(outputs.weights)
    vqgan = VQGAN.load(weights, VQGANConfig(**codec.manifest.declaration.settings["config"]))
    if vqgan.fingerprint != outputs.fingerprint:
        raise UserError(f"{weights}: not the weights that were committed; run the recipe again without this folder")
    boundaries = traced.sequence.cu_seqlens.tolist()
    whole: list[tuple[str, np.ndarray]] = []
    for number, document in enumerate(description["documents"]):
        tokens = traced.sequence.tokens[boundaries[number] : boundaries[number + 1]]
        pieces = _pieces(tokens, traced.sequence.lineage[number]["provenance"], traced.vocabulary)
        for place, (piece, plain) in enumerate(zip(pieces, document["content"], strict=True)):
            for frame, shown in zip(piece.frames, plain.get("frames", ())):
                if frame.whole:
                    shown["file"] = f"document-{number:04d}-{place}-frame-{frame.number:05d}.png"
                    whole.append((shown["file"], piece.tokens[frame.inside]))
    store = Store(folder)
    for first in range(0, len(whole), _FRAMES_AT_ONCE):
        names, codes = zip(*whole[first : first + _FRAMES_AT_ONCE])
        pictures = vqgan.decode(traced.vocabulary["vision"].ids_to_codes(np.stack(codes)))
        with first_contact(folder):
            for name, picture in zip(names, pictures):
                save_png(store, name, picture)
    return [name for name, _ in whole]


@dataclass(frozen=True)
class _Frame:
    """number, time: in its document, seconds or None. inside: where its codes lie in the piece. whole: all of them."""

    number: int
    time: float | None
    inside: slice
    whole: bool


@dataclass(frozen=True)
class _Piece:
    """A run of tokens of one modality; of vision, its frames."""

    modality: str
    tokens: np.ndarray
    frames: tuple[_Frame, ...] = ()


def _pieces(tokens: np.ndarray, provenance: dict[str, Any], vocabulary: JointVocabulary) -> Iterator[_Piece]:
    """The runs of one modality of a document, or of the piece of one, in turn."""
    numbers = np.searchsorted([one.stop for one in vocabulary.modalities], tokens, side="right")
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
    offset = provenance.get("document_range", [0])[0]
    for start, end in itertools.pairwise(edges):
        name = vocabulary.modalities[numbers[start]].name
        frames = _frames(start + offset, end + offset, provenance) if name == "vision" else ()
        yield _Piece(name, tokens[start:end], tuple(frames))


def _frames(start: int, end: int, provenance: dict[str, Any]) -> Iterator[_Frame]:
    """The frames in tokens start..end of the whole document, which lie in one of its streams."""
    (stream,) = (one for one in provenance["vision"] if one["start"] <= start and end <= one["end"])
    length = (stream["end"] - stream["start"]) // stream["frames"]  # codes and the mark of its end
    times = dict(enumerate(provenance.get("frame_times", ())))
    for number in range((start - stream["start"]) // length, -((stream["start"] - end) // length)):
        first = stream["start"] + number * length
        last = first + length - 1
        inside = slice(max(first, start) - start, min(last, end) - start)
        yield _Frame(number, times.get(number), inside, start <= first and last <= end)


def object_now(url: str, etag: str) -> str:
    """How an object is now, against the version that was read: unchanged, changed, gone, or why that is not known."""
    try:
        return "unchanged" if object_info(url).etag == etag else "changed since it was read"
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec raises it for a web server that does not answer, too
        is_gone = cause is None or getattr(cause, "status", None) in (404, 410)
        return "gone" if is_gone else f"not known ({cause})"
    except (OSError, ValueError, UserError) as error:
        return f"not known ({error})"


def _object(provenance: dict[str, Any], now: Callable[[str, str], str]) -> dict[str, Any]:
    known = {"part": [0.0, 1.0], **provenance} if "frame_times" in provenance else provenance
    found = {name: known[name] for name in _OBJECT if name in known}
    states = [now(one["url"], one["etag"]) for one in (found, found.get("media")) if one]
    return {**found, "now": next((state for state in states if state != "unchanged"), "unchanged")}


def _plain(piece: _Piece, tokenizer: TextTokenizer) -> dict[str, Any]:
    if piece.modality == "text":
        return {"text": tokenizer.decode(piece.tokens)}
    if piece.modality == "vision":
        return {"frames": [{"number": one.number, "time": one.time, "whole": one.whole} for one in piece.frames]}
    return {"modality": piece.modality, "tokens": len(piece.tokens)}


def _tokenizer(tokenize: StageOutput[TokenizeRecord]) -> tuple[KeptTokenizer, TextTokenizer]:
    kept = tokenize.record.outputs.text_tokenizer
    if kept is None:
        raise UserError(f"{tokenize.store.path()}: made by a version that kept no tokenizer; run the recipe again")
    folder, _, name = kept.file.rpartition("/")
    return kept, load_text_tokenizer(str(tokenize.store.fetch_folder(folder) / name))


def _shard(store: Store, manifest: Manifest[PackRecord], name: str, url: str) -> tuple[ShardSet, ShardStats]:
    for source, splits in manifest.record.outputs.sets.items():
        for split in splits:
            with _damage_named(store):
                shard_set = manifest.record.read_set(store, source, split)
            if shard_set and name in shard_set.names:
                return shard_set, shard_set.stats[shard_set.names.index(name)]
    raise UserError(f"{url}: {store.path()} made no such shard; `ringworld inspect` lists what it made")


_RECORDS: dict[str, type[Any]] = {stage.kind: stage.record for stage in (SourcesStage, CodecStage, TokenizeStage)}


def _before(store: Store, manifest: Manifest[Any]) -> dict[str, StageOutput[Any]]:
    """Every stage that a stage's output depends on."""
    run = Store(store.url.rsplit("/", 3)[0])
    outputs: dict[str, StageOutput[Any]] = {}
    for name, fingerprint in manifest.declaration.inputs.items():
        home = run.at(manifest.input_folders.get(name, f"stages/{name}/{fingerprint[:16]}"))
        before = read_manifest(home, _RECORDS.get(_kind(home) or "", PlainRecord))
        if before is None:
            raise UserError(f"{home.path()}: this stage, which the shard was made from, is gone; run the recipe again")
        outputs |= {name: StageOutput(home, before), **_before(home, before)}
    return outputs


def _kind(store: Store) -> str | None:
    """What kind of stage a folder is of; None where it is none, or one that is not done."""
    with _damage_named(store):
        tree = store.read_json(MANIFEST)
    return Declaration.from_json(tree).kind if tree else None


@contextlib.contextmanager
def _damage_named(store: Store) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f"{store.path()}: damaged ({error}); `ringworld inspect --verify` says what of it is") from None
