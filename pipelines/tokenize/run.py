"""Tokenizes the partitions of a listing on the cluster.

Decode tasks on CPUs, many to a long video, stream bounded chunks of frames to a pool of encoders; text goes through the
byte-pair tokenizer; every record through its field spec. In: the listing, the VQGAN. Out: for each partition a Parquet
of documents, and its record with counts and quarantine, of which the recipe bounds the share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import ray

from pipelines.cluster.progress import Bar
from pipelines.dag.partitions import run_partitions
from pipelines.dag.stage import Made
from pipelines.recipe import Recipe
from pipelines.sources.heldout import check_heldout
from pipelines.tokenize.encode_media import vqgan_pool
from pipelines.tokenize.partition import Partition, tokenize_partition, tokenize_piece
from pipelines.tokenize.quarantine import Quarantine
from pipelines.tokenize.record import (
    KeptTokenizer,
    TokenizedPartition,
    TokenizeFigures,
    TokenizeOutputs,
    TokenizeRecord,
)
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.video_pieces import PIECES, Piece
from pipelines.tokenize.vocabulary import joint_vocabulary
from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.text.tokenizer_files import SPECIAL_TOKENS, fetch_tokenizer

TOKENIZER = "tokenizer"


def tokenize_all(
    recipe: Recipe, parts: Sequence[Partition], made_of: Mapping[str, Any], codec: Store | None, store: Store, line: Bar
) -> Made[TokenizeRecord]:
    """Tokenize every partition.

    made_of: identifies the sources and the codec, for the record. codec: its stage's folder; None where all is text.
    """
    encoders = vqgan_pool(recipe.vqgan, codec, recipe.tokenize.encode) if recipe.vqgan and codec else nullcontext()
    with encoders as pool:
        return tokenize_by(pool, recipe, parts, made_of, store, line)


def tokenize_by(
    pool: Any, recipe: Recipe, parts: Sequence[Partition], made_of: Mapping[str, Any], store: Store, line: Bar
) -> Made[TokenizeRecord]:
    """The same with a pool of encoders that runs already; None where there is only text."""
    tokenizer = _keep_tokenizer(recipe, store)
    partitions = {part.name: part for part in parts}
    job = TokenizeJob(recipe, joint_vocabulary(recipe), recipe.vqgan.sizes.resolution if recipe.vqgan else 0)
    decode = recipe.tokenize.decode
    windows = recipe.tokenize.frames_per_document is not None
    quarantine = Quarantine(recipe.tokenize.max_bad_fraction, partitions, windows)

    def submit(work: str | Piece) -> ray.ObjectRef:
        options = {"max_retries": 0, **decode.ray_options}
        if isinstance(work, Piece):
            return tokenize_piece.options(name=f"tokenize:{work.name}", **options).remote(work, job, pool, store)
        return tokenize_partition.options(name=f"tokenize:{work}", **options).remote(partitions[work], job, pool, store)

    def on_done(record: dict[str, Any]) -> None:
        line.advance(1, frames=record["frames"] or None, tokens=record["tokens"])
        quarantine.add(record)

    def on_piece(left: int) -> None:
        line.advance(0, pieces_left=left)

    try:
        records = run_partitions("tokenize", submit, list(partitions), store, decode, on_done, on_piece)
    finally:
        quarantine.report()
    for name in store.names(PIECES):
        store.delete(name)
    quarantine.check()
    matched: dict[str, set[str]] = {}
    for record in records:
        matched.setdefault(record["source"], set()).update(record["inner_heldout"])
    check_heldout(recipe, [found for part in parts for found in part.objects], matched)
    entries = tuple(entry for record in records for entry in record["quarantine"])
    counted = ("documents", "tokens", "vision_tokens", "frames", "thinned_videos", "frames_left_out")
    totals = {key: sum(record.get(key, 0) for record in records) for key in counted}
    if not totals["documents"]:
        raise UserError("sources: no document came out of them; see the quarantine list of the tokenize stage")
    names = [entry.name for entry in fields(TokenizedPartition)]
    outputs = TokenizeOutputs(
        partitions=tuple(TokenizedPartition(**{name: record[name] for name in names}) for record in records),
        text_tokenizer=tokenizer,
        files=store.hashes(TOKENIZER),
        made_of={**made_of, "text_tokenizer": tokenizer.fingerprint},
    )
    figures = TokenizeFigures(**totals, units=quarantine.units, quarantined=len(entries))
    return Made(TokenizeRecord(outputs, figures), entries)


def _keep_tokenizer(recipe: Recipe, store: Store) -> KeptTokenizer:
    """Commit a copy of the text tokenizer, so that the documents can be read without its source."""
    local = fetch_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)
    beside = [local.with_name(name) for name in SPECIAL_TOKENS if local.suffix == ".json"]
    for path in (local, *[path for path in beside if path.is_file()][:1]):
        with store.writing(f"{TOKENIZER}/{path.name}") as file:
            file.write(path.read_bytes())
    fingerprint = load_text_tokenizer(str(local)).fingerprint
    return KeptTokenizer(f"{TOKENIZER}/{local.name}", public_url(recipe.text_tokenizer.path), fingerprint)
