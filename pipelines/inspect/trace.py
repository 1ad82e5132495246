"""Where a packed sequence comes from, for `ringworld trace`: back from a shard to objects, frames and settings.

In: the URL of a shard inside a run's folder, and a key. Out: plain JSON: the objects, records and frame times of each
of its documents, the settings and fingerprints of all stages behind it, its tokens as text; its frames as PNG files.
All is found from the run's manifests: the objects themselves need not be there any more. Where they are, it is said
whether they have changed since.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import StageOutput, is_fingerprint, read_manifest
from pipelines.inspect.content import Piece, codec_of, pieces_of, tokenizer_of
from pipelines.inspect.lineage import damage_named, kind_of, stages_before
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.sources.generated import GENERATED
from pipelines.tokenize.stage import TokenizeStage
from storage.errors import BadData, UserError
from storage.store import Store
from storage.urls import first_contact, object_info
from tokenization.document import PackedSequence
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import read_sequence
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

_FRAMES_AT_ONCE = 64
_OBJECT = ("url", "etag", "part", "record", "sample", "member", "media", "texts")


@dataclass(frozen=True)
class Traced:
    """A sequence with its shard's URL. stages: folder and manifest of the stage that packed it and of all before it."""

    shard: str
    sequence: PackedSequence
    vocabulary: JointVocabulary
    objective: str
    pack: str
    stages: dict[str, StageOutput[Any]]

    def ofkind_of(self, kind: str) -> StageOutput[Any] | None:
        """The stage of this kind, if one is behind the sequence."""
        return next((one for one in self.stages.values() if one.manifest.declaration.kind == kind), None)


def find(url: str, key: str) -> Traced:
    """The sequence with this key of a shard. Raises UserError if it is no shard of a run or has no such key."""
    folder, _, name = url.rstrip("/").rpartition("/")
    home, _, shards = folder.rpartition("/")
    outputs: list[StageOutput[PackRecord]] = []
    if shards == "shards" and name.endswith(".tar"):
        with first_contact(url):
            outputs = _packed(Store(home))
    if not outputs:
        place = "stages/pack-NAME/shards/SHARD.tar"
        raise UserError(
            f"{url}: not a shard of a run's finished pack stage; give the path of one, which ends in {place}"
        )
    output, shard_set, stats = _shard(outputs, f"{shards}/{name}", url)
    store, manifest = output.shared, output.manifest
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
    stages = {name: output, **stages_before(output.store, manifest)}
    return Traced(url, sequence, shard_set.vocabulary, shard_set.objective, name, stages)


def describe(traced: Traced) -> dict[str, Any]:
    """All that is known of the sequence, plain JSON; `documents` in the order of its tokens."""
    sequence, tokenize, codec = traced.sequence, traced.ofkind_of(TokenizeStage.kind), traced.ofkind_of(CodecStage.kind)
    assert tokenize is not None, "documents are tokenized"
    kept, tokenizer = tokenizer_of(tokenize)
    boundaries = sequence.cu_seqlens.tolist()
    now = functools.cache(object_now)
    documents = []
    for number, lineage in enumerate(sequence.lineage):
        (start, end), provenance = boundaries[number : number + 2], lineage["provenance"]
        pieces = pieces_of(sequence.tokens[start:end], provenance, traced.vocabulary)
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

    codec = traced.ofkind_of(CodecStage.kind)
    if codec is None:
        raise UserError(f"{traced.shard}: the run has no VQGAN, so there is no frame to decode; leave out --out")
    vqgan = codec_of(codec)
    boundaries = traced.sequence.cu_seqlens.tolist()
    whole: list[tuple[str, np.ndarray]] = []
    for number, document in enumerate(description["documents"]):
        tokens = traced.sequence.tokens[boundaries[number] : boundaries[number + 1]]
        pieces = pieces_of(tokens, traced.sequence.lineage[number]["provenance"], traced.vocabulary)
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


def object_now(url: str, etag: str) -> str:
    """How an object is now, against the version that was read: unchanged, changed, gone, or why that is not known.

    What was generated is no object outside the run, and is always as it was.
    """
    if url.startswith(GENERATED):
        return "unchanged"
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


def _plain(piece: Piece, tokenizer: TextTokenizer) -> dict[str, Any]:
    if piece.modality == "text":
        return {"text": tokenizer.decode(piece.tokens)}
    if piece.modality == "vision":
        return {"frames": [{"number": one.number, "time": one.time, "whole": one.whole} for one in piece.frames]}
    return {"modality": piece.modality, "tokens": len(piece.tokens)}


def _packed(home: Store) -> list[StageOutput[PackRecord]]:
    """What a folder with shards belongs to: all that a pack stage made in a run, the latest first, or a fingerprint."""
    folders = [home, *(home.at(name) for name in home.folders() if is_fingerprint(name))]
    manifests = [(store, read_manifest(store, PackRecord)) for store in folders if kind_of(store) == PackStage.kind]
    outputs = [StageOutput(store, manifest) for store, manifest in manifests if manifest]
    return sorted(outputs, key=lambda output: output.manifest.finished, reverse=True)


def _shard(
    outputs: Sequence[StageOutput[PackRecord]], name: str, url: str
) -> tuple[StageOutput[PackRecord], ShardSet, ShardStats]:
    """The output that has a shard, the shard's set and its stats."""
    for output in outputs:
        for source, splits in output.record.outputs.sets.items():
            for split in splits:
                with damage_named(output.store):
                    shard_set = output.record.read_set(output.shared, source, split)
                if shard_set and name in shard_set.names:
                    return output, shard_set, shard_set.stats[shard_set.names.index(name)]
    made = outputs[0].shared.path()
    raise UserError(f"{url}: {made} made no such shard; `ringworld inspect` lists what it made")
