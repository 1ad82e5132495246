"""The tokenize stage: raw objects to documents in the joint vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.codecs.record import CodecRecord
from pipelines.dag.manifest import Manifest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.recipe import Recipe, Tokenize, output_settings
from pipelines.report.numbers import count_of
from pipelines.sources.listing import read_objects
from pipelines.sources.stage import SourcesRecord
from pipelines.tokenize.record import TokenizeRecord
from storage.store import Store
from tokenization.text.tokenizer_files import find_tokenizer

CODES = "codes"
"""The store of codes in a run's root."""


@dataclass(frozen=True)
class TokenizeStage(Stage[TokenizeRecord]):
    """codec: the name of the stage that makes the codec of the sources' media; None where all is text. packs: the names
    of the stages that pack the documents. estimate: how long encoding will take, for the plan.
    """

    kind = "tokenize"
    record = TokenizeRecord
    output_version = 4
    libraries = ("av", "pillow", "tokenizers", "sentencepiece", "torch", "diffusers", "pyarrow")

    recipe: Recipe
    codec: str | None
    packs: tuple[str, ...] = ()
    estimate: tuple[str, ...] = ()

    @property
    def kept_for(self) -> tuple[str, ...]:
        """All that is packed of the documents."""
        return self.packs

    @property
    def inputs(self) -> tuple[str, ...]:
        """The listing, and the codec where there are media."""
        return ("sources", self.codec) if self.codec else ("sources",)

    def settings(self) -> Mapping[str, Any]:
        """Field specs, sampling, the hashes of the tokenizer's files, and the encoder's precision."""
        recipe = self.recipe
        tokenizer = find_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)
        special = {"special_tokens": tokenizer.special.etag} if tokenizer.special else {}
        turns = {name: source.turns for name, source in recipe.sources.items() if source.turns}
        return {
            "fields": {name: source.fields for name, source in recipe.sources.items()},
            "max_frames": {name: source.max_frames for name, source in recipe.sources.items() if source.max_frames},
            "tokenize": output_settings(recipe.tokenize),
            "text_tokenizer": tokenizer.model.etag,
            **special,
            **({"turns": turns} if turns else {}),
            "encoder": recipe.vqgan.precision if recipe.vqgan else None,
            "seed": recipe.seed,
        }

    def resources(self) -> Capacity:
        """One decoding task beside the fewest encoders."""
        decode, encode = self.recipe.tokenize.decode, self.recipe.tokenize.encode
        return Capacity().plus(decode, 1).plus(encode, encode.min_workers if self.codec else 0)

    def notes(self, figures: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Which videos are thinned, or how many were."""
        if figures is None:
            vision = [name for name, source in self.recipe.sources.items() if source.has_vision]
            most = {name: frames for name in vision if (frames := self.recipe.max_frames(name)) is not None}
            thinned = tuple(_will_thin(name, frames, self.recipe.tokenize) for name, frames in most.items())
            return self.estimate + thinned
        videos, frames = figures.get("thinned_videos", 0), figures.get("frames_left_out", 0)
        return (f"{count_of(videos, 'videos')} thinned to max_frames: {frames:,} frames left out",) if videos else ()

    def run(self, context: StageContext) -> Made[TokenizeRecord]:
        """Tokenize every partition on the cluster."""
        from pipelines.tokenize.partition import Partitions
        from pipelines.tokenize.run import TokenizePlace, tokenize_all

        sources = context.input("sources", SourcesRecord)
        codec = context.input(self.codec, CodecRecord) if self.codec else None
        fingerprint = codec.record.outputs.fingerprint if codec else None
        settings = self.document_settings(fingerprint, context.rebuild)
        objects = read_objects(sources.store, self.recipe)
        partitions = Partitions(objects, self.recipe.tokenize.partition_bytes, settings)
        made_of = {"sources": sources.record.figures, "vqgan": fingerprint}
        place = TokenizePlace(context.store, context.shared, codes_store(self.recipe))
        with bar(self.name, len(partitions), "part") as line:
            return tokenize_all(self.recipe, partitions, made_of, codec, place, line)

    def document_settings(self, codec: str | None, rebuild: int) -> dict[str, Mapping[str, Any]]:
        """By source all that decides its documents beside the objects: less than `settings`, which are of all sources.

        codec: the fingerprint of its weights.
        """
        from pipelines.tokenize.vocabulary import joint_vocabulary

        every = self.settings()
        shared = {key: value for key, value in every.items() if key in ("text_tokenizer", "special_tokens", "seed")}
        shared |= {"vocabulary": joint_vocabulary(self.recipe).to_json()}
        shared |= {"output_version": self.output_version, "rebuild": rebuild}
        limits = asdict(self.recipe.tokenize.decoder_limits)
        vision = {"tokenize": every["tokenize"], "encoder": every["encoder"], "codec": codec}
        return {
            name: {"fields": source.fields, "max_frames": source.max_frames, **shared}
            | (vision if source.has_vision else {"limits": limits})
            | ({"turns": source.turns} if source.turns else {})
            for name, source in self.recipe.sources.items()
        }

    def summary(self, manifest: Manifest[TokenizeRecord]) -> tuple[str, ...]:
        """Documents and tokens."""
        figures = manifest.record.figures
        thinned = (f"{count_of(figures.thinned_videos, 'videos')} thinned",) if figures.thinned_videos else ()
        return (count_of(figures.documents, "documents"), count_of(figures.tokens, "tokens"), *thinned)


def codes_store(recipe: Recipe) -> Store:
    """Where the recipe keeps codes. No lease covers it: what is there is created and never changed."""
    storage = recipe.storage
    if storage.codes is None:
        return Store(storage.root, storage.options).at(CODES)
    return Store(storage.codes, storage.options)


def _will_thin(source: str, frames: int, settings: Tokenize) -> str:
    longer = f"videos of more than {frames / settings.fps:g} s"
    if settings.frames_per_document is None:
        return f"of source {source}, {longer} are thinned to {frames} frames (max_frames)"
    return f"of source {source}, {longer} lose whole documents down to {frames} frames (max_frames)"
