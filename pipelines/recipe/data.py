"""From raw objects to packed shards: where things are, sources, tokenizers, packing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.recipe.base import Config, EncoderResources, Name, Resources, user_error_as_value_error
from storage.reach import PUBLIC_WEB
from storage.setting_types import Above0, Count, Finite, NeutralUntilSet, OutputNeutral, Positive, Text
from tokenization.codecs.vqgan.config import VQGANConfig, VQGANTraining
from tokenization.field_spec import FieldSpec
from tokenization.generated.settings import Kind as Generated
from tokenization.media.turns import Turn

FileKind = Literal["video", "image", "text", "webdataset", "records"]
Kind = Literal["video", "image", "text", "webdataset", "records", "generated"]
Objective = Literal["text", "vision-text"]


class Storage(Config):
    """Where things are."""

    root: Text
    """Output folder of the run, any fsspec URL; a relative path is relative to the working directory."""
    codes: Text | None = None
    """Folder in which codes of videos and images are kept and found again, any fsspec URL; runs and users may share it.
    None: `codes` in `root`."""
    data: str = ""
    """Prefix of the sources' relative URLs, so that one setting moves a recipe to another bucket."""
    options: dict[str, Any] = Field(default_factory=dict)
    """fsspec options of the object store (endpoint_url, anon, ...). Credentials belong to the environment."""


class Source(Config):
    """One named source of raw objects, or of generated documents."""

    urls: list[Text] = Field(default_factory=list)
    """fsspec URLs with globs. `package://NAME/path` is a file of an installed Python package."""
    generate: Annotated[Generated, Field(discriminator="kind")] | None = None
    """In place of `urls`: documents that are generated from a seed. They have no field specs; `heldout` names objects
    of them, each a range of their numbers, by keys such as `NAME/000000000-000000063`."""
    kind: FileKind | None = None
    """None: by extension. `webdataset`: tars of media with their `.json` and `.txt` (caption), as img2dataset and
    video2dataset write them. `records`: tables (JSONL, CSV, TSV, Parquet) whose records each name a medium, in the
    column `media`."""
    media: Text | None = None
    """Column of a table that names each record's video or image by URL, absolute or relative to the file, or holds it;
    the other columns (caption, question, answer, ...) are the record's fields beside `vision`."""
    media_from: list[Text] = Field(default_factory=lambda: list(PUBLIC_WEB))
    """URL prefixes from which records may name media, besides their own file's folder, bucket, host or package:
    `s3://BUCKET/images/`, `https://HOST/`, a folder. `http://` and `https://` alone are all hosts with public
    addresses; a host that is named may have any address."""
    side: list[Text] = Field(default_factory=list)
    """Tables with captions, questions, answers for the media, joined by key."""
    fields: list[str] = Field(default_factory=lambda: ["text"], min_length=1)
    """LWM field specs; several: one of those that a record fits is drawn for it, by the seed and its key."""
    heldout: list[Text] = Field(default_factory=list)
    """Patterns as those of `urls`, or globs over URLs and keys, of tars also over the samples' keys (TAR/KEY), of
    records over the URLs of their media: what matches is never trained on."""
    heldout_tail: Finite[float] = Field(default=0.0, ge=0, lt=1)
    """Share of each video, from its end, that is never trained on: the future of what was seen."""
    turns: NeutralUntilSet[list[Turn]] = None
    """What is trained on is there once more in each of these turns, as further documents: small sources give more to
    learn motion from. Each copy of a video is decoded by one task."""
    max_frames: Positive | None = None
    """Frames a video of this source has at most; None: tokenize.max_frames. With tokenize.frames_per_document, whole
    documents of a longer one are left out, evenly."""

    @property
    def has_vision(self) -> bool:
        """Whether a field spec has frames."""
        return any(FieldSpec.parse(spec).has_vision for spec in self.fields)

    @field_validator("fields")
    @classmethod
    def _are_field_specs(cls, fields: list[str]) -> list[str]:
        for spec in fields:
            with user_error_as_value_error():
                FieldSpec.parse(spec)
        return fields

    @field_validator("media_from")
    @classmethod
    def _are_prefixes(cls, prefixes: list[str]) -> list[str]:
        for prefix in prefixes:
            scheme, separator, place = prefix.rpartition("://")
            if "::" in prefix or "://" in scheme or ".." in place.split("/") or set("*?[@") & set(place):
                raise ValueError(
                    f"{prefix!r} is no prefix of URLs; write s3://BUCKET/FOLDER/, https://HOST/ or a folder"
                )
            if separator and not place.strip("/") and prefix not in PUBLIC_WEB:
                raise ValueError(
                    f"{prefix!r} would allow everything that {scheme} reads; name a bucket, host or folder"
                )
        return prefixes

    @model_validator(mode="after")
    def _has_one_origin(self) -> Source:
        if (self.generate is None) == (not self.urls):
            raise ValueError("give either urls or generate, not both and not neither")
        if self.generate is not None and (others := self.model_fields_set - {"generate", "heldout"}):
            raise ValueError(f"{min(others)} is of sources with urls, not of generated documents; drop it")
        return self

    @model_validator(mode="after")
    def _names_its_media(self) -> Source:
        if self.kind == "records" and self.media is None:
            raise ValueError("kind records needs the key media, the column that names each record's video or image")
        if self.media is not None and self.kind not in (None, "records"):
            raise ValueError(f"media is of kind records, not {self.kind}; drop one of the two")
        return self


class TextTokenizer(Config):
    """The byte-pair vocabulary."""

    path: Text = "package://mistral_common/data/tokenizer.model.v1"
    """A sentencepiece `.model` or a Hugging Face `tokenizer.json`."""


class VisualTokenizer(Config):
    """The visual tokenizer: named weights, or a small one trained here."""

    config: Literal["lwm", "small"] | dict[str, int | list[int]] = "lwm"
    """`lwm`: 256 px, 8,192 codes of 64 dimensions, 146M parameters. `small`: 64 px, 2,048 codes, trained in minutes on
    two cores. Or the sizes of tokenization.codecs.vqgan.VQGANConfig one by one."""
    weights: Text | None = None
    """A folder in diffusers' format, or LWM's released pickle."""
    train: VQGANTraining | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder's convolutions when tokenizing."""

    @model_validator(mode="after")
    def _is_whole(self) -> VisualTokenizer:
        if (self.weights is None) == (self.train is None):
            raise ValueError("give either vqgan.weights or vqgan.train, not both and not neither")
        try:
            with user_error_as_value_error():
                self.sizes  # noqa: B018 - builds and so checks them
        except TypeError as error:
            raise ValueError(f"vqgan.config: {str(error).removeprefix('VQGANConfig.__init__() ')}") from None
        return self

    @property
    def sizes(self) -> VQGANConfig:
        """The sizes as the tokenizer's own type."""
        if isinstance(self.config, str):
            return {"lwm": VQGANConfig.lwm, "small": VQGANConfig.small}[self.config]()
        return VQGANConfig(**self.config)  # type: ignore[arg-type]


class Tokenize(Config):
    """Raw objects to documents."""

    fps: Above0 = 4.0
    """Frames a second sampled from video."""
    max_frames: Positive = 900
    """Longer videos are sampled uniformly down to this many frames (LWM's rule); none are where frames_per_document is
    set."""
    frames_per_document: Positive | None = None
    """A video is cut in documents of so many consecutive frames, and none is left out; None: one document a video."""
    frame_step: NeutralUntilSet[Positive] = None
    """The frames of a document are so many samples apart, and the samples between them are documents of their own: at
    fps 24 and a step of 4, four documents of 6 frames a second over the same time. Needs frames_per_document; None: 1.
    """
    chunk_frames: Positive = 32
    """Frames decoded at a time."""
    decoder_memory_gib: Finite[float] = Field(default=DEFAULT_LIMITS.memory / 2**30, ge=0.5)
    """Memory of a process that decodes; a video or image that takes more is bad. 8K video takes 1, the largest images
    2.5."""
    decoder_cpu_seconds: Positive = DEFAULT_LIMITS.cpu_seconds
    """Processor time that decoding a video, a piece of one or an image may take, beyond a minute for each MiB read and
    0.1 seconds for each frame; what takes more is bad."""
    partition_bytes: Positive = 64 * 2**20
    """Objects are grouped in partitions of so many bytes at most; one of more than half of them is a partition of its
    own, and a video, or a file of records that name media, counts as a thirty-second of them at least."""
    piece_seconds: OutputNeutral[Above0] = 300.0
    """A longer video is decoded in pieces of so many seconds, by as many tasks, on as many nodes as there are."""
    in_flight_mib: OutputNeutral[Positive] = 32
    """Frames that a decode task has under way to the encoders at most, in MiB; all decode tasks together have so many
    times more of them in Ray's object stores."""
    decode: OutputNeutral[Resources] = Resources()
    encode: OutputNeutral[EncoderResources] = EncoderResources()
    max_bad_fraction: OutputNeutral[float] = Field(default=0.01, ge=0, le=1)
    """The stage fails when more than this share of objects or records ends in quarantine."""

    @model_validator(mode="after")
    def _cuts_what_it_steps_through(self) -> Tokenize:
        if self.frame_step is not None and self.frames_per_document is None:
            raise ValueError("tokenize.frame_step needs tokenize.frames_per_document; set that, or drop frame_step")
        return self

    @property
    def document_fps(self) -> float:
        """Frames a second of a document."""
        return self.fps / (self.frame_step or 1)

    @property
    def window(self) -> int | None:
        """Consecutive samples that are cut in documents together; None: all of a video."""
        return None if self.frames_per_document is None else self.frames_per_document * (self.frame_step or 1)

    @property
    def decoder_limits(self) -> Limits:
        """The limits as the decoder's own type."""
        return Limits(int(self.decoder_memory_gib * 2**30), self.decoder_cpu_seconds)


class PackedData(Config, ABC):
    """Which documents are packed together, in sequences of which length: the data of one stage of training."""

    name: Name
    context: Positive
    """Tokens of a packed sequence."""
    objective: Objective
    min_document_tokens: Count = 0
    max_document_tokens: Positive | None = None
    """Only documents of these lengths (LWM: longer books in later stages)."""

    @property
    @abstractmethod
    def source_names(self) -> list[str]:
        """The sources whose documents are packed, sorted."""


class ShardsAlone(PackedData):
    """The data of a stage that somebody else trains."""

    sources: list[Name] = Field(min_length=1)

    @property
    def source_names(self) -> list[str]:
        """See `PackedData`."""
        return sorted(set(self.sources))


class Pack(Config):
    """Documents to shards of packed sequences."""

    stages: OutputNeutral[list[ShardsAlone]] = Field(default_factory=list)
    """What is packed by a recipe without `train`; with it, each stage of the curriculum names its own data."""
    window: Positive = 10_000
    """Documents that best-fit packing looks at together."""
    partition_tokens: Positive = 2**30
    """Documents are packed in partitions of about so many tokens."""
    sequences_per_shard: Positive = 1024
    pool: OutputNeutral[Resources] = Resources()
