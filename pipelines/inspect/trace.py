"""Where a packed sequence comes from, for `ringworld trace`: back from a shard to objects, frames and settings.

In: the URL of a shard inside a run's folder, and a key. Out: plain JSON: the objects, records and frame times of each
of its documents, the settings and fingerprints of all stages behind it, its tokens as text; its frames as PNG files.
All is found from the run's manifests: the objects themselves are not opened and need not be there any more.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.dag.stage import MANIFEST
from storage.errors import BadData, UserError
from storage.store import Store
from storage.urls import first_contact
from tokenization.document import PackedSequence
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import read_sequence
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

Manifest = dict[str, Any]
_FRAMES_AT_ONCE = 64
_OBJECT = ("url", "etag", "part", "record", "sample", "member", "media")


@dataclass(frozen=True)
class Traced:
    """A sequence that was found. stages: folder and manifest of the stage that packed it and of all before it."""

    shard: str
    sequence: PackedSequence
    vocabulary: JointVocabulary
    objective: str
    pack: str
    stages: dict[str, tuple[Store, Manifest]]


def find(url: str, key: str) -> Traced:
    """The sequence with this key of a shard. Raises UserError if it is no shard of a run or has no such key."""
    folder, _, name = url.rstrip("/").rpartition("/")
    home, _, shards = folder.rpartition("/")
    store = Store(home)
    manifest = None
    if shards == "shards" and name.endswith(".tar"):
        with first_contact(url):
            manifest = _manifest(store)
    if manifest is None or "sets" not in manifest.get("outputs", {}):
        raise UserError(
            f"{url}: not a shard of a run's finished pack stage; give the path of one, which ends in "
            f"stages/pack-NAME/FINGERPRINT/shards/SHARD.tar"
        )
    shard_set, stats = _shard(store, manifest, f"{shards}/{name}", url)
    if key not in stats.index.key:
        raise UserError(
            f"{url}: no sequence has the key {key}; its {len(stats.index)} keys run from {stats.index.key[0]} to "
            f"{stats.index.key[-1]}"
        )
    try:
        with store.open(f"{shards}/{name}") as file:
            sequence = read_sequence(file, stats.index[stats.index.key.index(key)])
    except (FileNotFoundError, BadData) as error:
        missing = isinstance(error, FileNotFoundError)
        raise UserError(f"{url}: {'there is no such file' if missing else error}; pack it again") from None
    stages = {manifest["stage"]: (store, manifest), **_before(store, manifest)}
    return Traced(url, sequence, shard_set.vocabulary, shard_set.objective, manifest["stage"], stages)


def describe(traced: Traced) -> dict[str, Any]:
    """All that is known of the sequence, plain JSON; `documents` in the order of its tokens."""
    sequence, tokenize = traced.sequence, traced.stages["tokenize"]
    tokenizer = _tokenizer(*tokenize)
    boundaries = sequence.cu_seqlens.tolist()
    vqgan = traced.stages.get("vqgan")
    documents = []
    for number, lineage in enumerate(sequence.lineage):
        start, end = boundaries[number : number + 2]
        pieces = list(_pieces(sequence.tokens[start:end], lineage["provenance"], traced.vocabulary))
        documents.append(
            {
                "key": lineage["key"],
                "source": lineage["source"],
                "tokens": [start, end],
                "document_range": lineage["provenance"].get("document_range", [0, end - start]),
                "object": _object(lineage["provenance"]),
                "fields": lineage["provenance"].get("fields"),
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
            name: {"fingerprint": manifest["fingerprint"], "folder": store.path(), "settings": manifest["settings"]}
            for name, (store, manifest) in traced.stages.items()
        },
        "text_tokenizer": tokenize[1]["outputs"]["text_tokenizer"],
        "vqgan": {"fingerprint": vqgan[1]["outputs"]["fingerprint"]} if vqgan else None,
    }


def save_frames(traced: Traced, description: dict[str, Any], folder: str) -> list[str]:
    """Decode all whole frames to PNG files in a folder, name each in the description, and return the names.

    Raises UserError if the run's VQGAN is not there or not the one that made the codes.
    """
    from pipelines.evaluate.pictures import save_png
    from tokenization.codecs.vqgan.config import VQGANConfig
    from tokenization.codecs.vqgan.model import VQGAN

    if "vqgan" not in traced.stages:
        raise UserError(f"{traced.shard}: the run has no VQGAN, so there is no frame to decode; leave out --out")
    home, manifest = traced.stages["vqgan"]
    weights = home.fetch_folder(manifest["outputs"]["weights"])
    vqgan = VQGAN.load(weights, VQGANConfig(**manifest["settings"]["config"]))
    if vqgan.fingerprint != manifest["outputs"]["fingerprint"]:
        raise UserError(f"{weights}: not the weights that were committed; run the recipe again without this folder")
    boundaries = traced.sequence.cu_seqlens.tolist()
    store = Store(folder)
    names: list[str] = []
    for number, document in enumerate(description["documents"]):
        tokens = traced.sequence.tokens[boundaries[number] : boundaries[number + 1]]
        pieces = _pieces(tokens, traced.sequence.lineage[number]["provenance"], traced.vocabulary)
        for place, (piece, plain) in enumerate(zip(pieces, document["content"], strict=True)):
            whole = [(frame, shown) for frame, shown in zip(piece.frames, plain.get("frames", ())) if shown["whole"]]
            for first in range(0, len(whole), _FRAMES_AT_ONCE):
                some = whole[first : first + _FRAMES_AT_ONCE]
                codes = traced.vocabulary.ids_to_codes(np.stack([piece.tokens[frame.inside] for frame, _ in some]))
                with first_contact(folder):
                    for picture, (frame, shown) in zip(vqgan.decode(codes), some):
                        name = f"document-{number:04d}-{place}-frame-{frame.number:05d}.png"
                        shown["file"] = save_png(store, name, picture)
                        names.append(name)
    return names


@dataclass(frozen=True)
class _Frame:
    """number, time: in its document, seconds or None. inside: where its codes lie in the piece. whole: all of them."""

    number: int
    time: float | None
    inside: slice
    whole: bool


@dataclass(frozen=True)
class _Piece:
    """A run of tokens: text, or frames."""

    tokens: np.ndarray
    frames: tuple[_Frame, ...] = ()


def _pieces(tokens: np.ndarray, provenance: dict[str, Any], vocabulary: JointVocabulary) -> Iterator[_Piece]:
    """The text and the frames of a document, or of the piece of one, in turn."""
    vision = vocabulary.is_vision(tokens)
    edges = [0, *(np.flatnonzero(np.diff(vision)) + 1).tolist(), len(tokens)]
    offset = provenance.get("document_range", [0])[0]
    for start, end in itertools.pairwise(edges):
        if vision[start]:
            yield _Piece(tokens[start:end], tuple(_frames(start + offset, end + offset, provenance)))
        else:
            yield _Piece(tokens[start:end])


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


def _object(provenance: dict[str, Any]) -> dict[str, Any]:
    known = {"part": [0.0, 1.0], **provenance} if "frame_times" in provenance else provenance
    return {name: known[name] for name in _OBJECT if name in known}


def _plain(piece: _Piece, tokenizer: TextTokenizer) -> dict[str, Any]:
    if not piece.frames:
        return {"text": tokenizer.decode(piece.tokens)}
    return {"frames": [{"number": one.number, "time": one.time, "whole": one.whole} for one in piece.frames]}


def _tokenizer(store: Store, manifest: Manifest) -> TextTokenizer:
    kept = manifest["outputs"].get("text_tokenizer")
    if kept is None:
        raise UserError(f"{store.path()}: made by a Ringworld that kept no tokenizer; run the recipe again")
    folder, _, name = kept["file"].rpartition("/")
    return load_text_tokenizer(str(store.fetch_folder(folder) / name))


def _shard(store: Store, manifest: Manifest, name: str, url: str) -> tuple[ShardSet, ShardStats]:
    for splits in manifest["outputs"]["sets"].values():
        for entry in splits.values():
            shard_set = ShardSet.from_json(_read(store, entry["file"]) or {})
            if name in shard_set.names:
                return shard_set, shard_set.stats[shard_set.names.index(name)]
    raise UserError(f"{url}: {store.path()} made no such shard; `ringworld inspect` lists what it made")


def _before(store: Store, manifest: Manifest) -> dict[str, tuple[Store, Manifest]]:
    """Folder and manifest of every stage that a stage's output depends on."""
    stages = Store(store.url.rsplit("/", 2)[0])
    found: dict[str, tuple[Store, Manifest]] = {}
    for name, fingerprint in manifest["inputs"].items():
        home = stages.at(name, fingerprint[:16])
        before = _manifest(home)
        if before is None:
            raise UserError(f"{home.path()}: this stage, which the shard was made from, is gone; run the recipe again")
        found |= {name: (home, before), **_before(home, before)}
    return found


def _manifest(store: Store) -> Manifest | None:
    return _read(store, MANIFEST)


def _read(store: Store, name: str) -> Any:
    try:
        return store.read_json(name)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{store.path(name)}: damaged ({error}); `ringworld inspect --verify` says what else is"
        ) from None
