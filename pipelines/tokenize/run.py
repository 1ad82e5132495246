"""Tokenizes the partitions of a listing on the cluster.

Decode tasks on CPUs, many to a long video, stream bounded chunks of frames to a pool of encoders; text goes through the
byte-pair tokenizer; every record through its field spec. In: the listing, the VQGAN. Out: for each partition a Parquet
of documents, and its record with counts and quarantine, of which the recipe bounds the share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import ray

from pipelines.cluster.progress import Bar
from pipelines.codecs.record import CodecRecord
from pipelines.dag.manifest import StageOutput
from pipelines.dag.partitions import run_partitions
from pipelines.dag.records import FooterRecords
from pipelines.dag.stage import Made
from pipelines.recipe import Recipe, VisualTokenizer
from pipelines.sources.heldout import check_heldout
from pipelines.tokenize.codes.place import CodesPlace, Encoding, codes_place
from pipelines.tokenize.codes.users import note_user
from pipelines.tokenize.encode_media import vqgan_pool
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.quarantine import Quarantine
from pipelines.tokenize.record import (
    PARTITIONS,
    CodesUsed,
    KeptTokenizer,
    TokenizedPartition,
    TokenizeFigures,
    TokenizeOutputs,
    TokenizeRecord,
    write_partitions,
)
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.tokenize_task import DOCUMENTS, MADE, tokenize_partition, tokenize_piece
from pipelines.tokenize.video_pieces import PIECES, Piece
from pipelines.tokenize.vocabulary import joint_vocabulary
from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.text.tokenizer_files import SPECIAL_TOKENS, fetch_tokenizer

TOKENIZER = "tokenizer"
_KEPT = tuple(entry.name for entry in fields(TokenizedPartition))
_COUNTED = ("documents", "tokens", "vision_tokens", "frames", "thinned_videos", "frames_left_out")


@dataclass(frozen=True)
class TokenizePlace:
    """Where a stage works. own: its folder. shared: that of all its fingerprints. codes: where codes are kept."""

    own: Store
    shared: Store
    codes: Store


def tokenize_all(
    recipe: Recipe,
    parts: Partitions,
    made_of: Mapping[str, Any],
    codec: StageOutput[CodecRecord] | None,
    place: TokenizePlace,
    line: Bar,
) -> Made[TokenizeRecord]:
    """Tokenize every partition.

    parts: by name. made_of: identifies the sources and the codec, for the record. codec: None where all is text.
    """
    if recipe.vqgan is None or codec is None:
        return tokenize_by(None, None, recipe, parts, made_of, place, line)
    encoding = encoding_of(recipe.vqgan, codec.record.outputs.fingerprint, recipe.tokenize.fps)
    pool = vqgan_pool(recipe.vqgan, codec.store, recipe.tokenize.encode)
    note_user(place.codes, Store(recipe.storage.root, recipe.storage.options))
    with codes_place(place.codes, encoding) as codes, pool as encoders:
        return tokenize_by(encoders, codes, recipe, parts, made_of, place, line)


def encoding_of(vqgan: VisualTokenizer, fingerprint: str, fps: float) -> Encoding:
    """What decides the codes of a medium, by a codec of this fingerprint."""
    return Encoding(fingerprint, vqgan.precision, vqgan.sizes.resolution, fps)


def tokenize_by(
    pool: Any,
    codes: CodesPlace | None,
    recipe: Recipe,
    parts: Partitions,
    made_of: Mapping[str, Any],
    place: TokenizePlace,
    line: Bar,
) -> Made[TokenizeRecord]:
    """The same with a pool of encoders that runs already; None where there is only text."""
    tokenizer = _keep_tokenizer(recipe, place.own)
    job = TokenizeJob(recipe, joint_vocabulary(recipe), recipe.vqgan.sizes.resolution if recipe.vqgan else 0, codes)
    shared = ray.put(job)  # once, not with every task
    decode = recipe.tokenize.decode
    held = parts.held(windows=recipe.tokenize.frames_per_document is not None)
    quarantine = Quarantine(recipe.tokenize.max_bad_fraction, held)
    tokenized: dict[str, TokenizedPartition] = {}
    totals: Counter[str] = Counter()
    matched: dict[str, set[str]] = {}

    options = {"max_retries": 0, **decode.ray_options}
    # Not named by partitions: the driver's Ray keeps 10 KiB for each name that it has ever seen.
    whole = tokenize_partition.options(name="tokenize", **options)
    of_video = tokenize_piece.options(name="tokenize:piece", **options)

    def submit(work: str | Piece) -> ray.ObjectRef:
        if isinstance(work, Piece):
            return of_video.remote(work, shared, pool, place.shared)
        return whole.remote(parts[work], shared, pool, place.shared)

    def on_done(record: dict[str, Any]) -> None:
        totals.update({"partitions_made": int(MADE in record), "frames_encoded": record.pop(MADE, 0)})
        line.advance(1, frames=record["frames"] or None, tokens=record["tokens"])
        tokenized[record["partition"]] = TokenizedPartition(**{name: record[name] for name in _KEPT})
        totals.update({name: record[name] for name in _COUNTED})
        matched.setdefault(record["source"], set()).update(record["inner_heldout"])
        quarantine.add(record)

    def on_piece(left: int) -> None:
        line.advance(0, pieces_left=left)

    try:
        committed = FooterRecords(place.shared, DOCUMENTS)
        run_partitions("tokenize", submit, list(parts), committed, decode, on_done, on_piece)
    finally:
        quarantine.report()
    place.shared.delete_many(place.shared.names(PIECES))
    quarantine.check()
    check_heldout(recipe, parts.objects, matched)
    if not totals["documents"]:
        raise UserError("sources: no document came out of them; see the quarantine list of the tokenize stage")
    bad = quarantine.entries
    write_partitions(place.own, [tokenized[name] for name in parts])
    outputs = TokenizeOutputs(
        partitions=PARTITIONS,
        text_tokenizer=tokenizer,
        files={**place.own.hashes(TOKENIZER), PARTITIONS: place.own.sha256(PARTITIONS), **bad.write(place.own)},
        made_of={**made_of, "text_tokenizer": tokenizer.fingerprint},
        codes=CodesUsed(codes.encoding, recipe.storage.codes and public_url(place.codes.path())) if codes else None,
    )
    figures = TokenizeFigures(**totals, units=quarantine.units, quarantined=bad.count)
    return Made(TokenizeRecord(outputs, figures), bad.listed(), bad.count)


def _keep_tokenizer(recipe: Recipe, store: Store) -> KeptTokenizer:
    """Commit a copy of the text tokenizer, so that the documents can be read without its source."""
    local = fetch_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)
    beside = [local.with_name(name) for name in SPECIAL_TOKENS if local.suffix == ".json"]
    for path in (local, *[path for path in beside if path.is_file()][:1]):
        with store.writing(f"{TOKENIZER}/{path.name}") as file:
            file.write(path.read_bytes())
    fingerprint = load_text_tokenizer(str(local)).fingerprint
    return KeptTokenizer(f"{TOKENIZER}/{local.name}", public_url(recipe.text_tokenizer.path), fingerprint)
