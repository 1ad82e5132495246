"""The recipe: one typed tree that says what to run, validated once, at the edge. recipe_file.py reads one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenization.vqgan.config import VQGANConfig

Objective = Literal["text", "vision-text"]
Kind = Literal["video", "image", "text"]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Config(BaseModel):
    """A branch of the tree: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Storage(Config):
    """Where things are."""

    root: str
    """Output folder of the run, any fsspec URL; a relative path is relative to the working directory."""
    data: str = ""
    """Prefix of the sources' relative URLs, so that one setting moves a recipe to another bucket."""
    options: dict[str, Any] = {}
    """fsspec options of the object store (endpoint_url, anon, ...). Credentials belong to the environment."""


class Resources(Config):
    """What one task or actor of a pool asks of Ray, and how many of them run."""

    cpus: float = 1.0
    gpus: float = 0.0
    custom: dict[str, float] = {}
    """Custom Ray resources, by which cluster.yaml says which pool a stage lands on."""
    workers: Positive = 1
    """Tasks in flight, or actors in the pool."""

    @property
    def ray_options(self) -> dict[str, Any]:
        """What one worker asks for, as the options of a Ray task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.custom}


class Source(Config):
    """One named source of raw objects."""

    urls: list[str] = Field(min_length=1)
    """fsspec URLs with globs. `package://NAME/path` is a file of an installed Python package."""
    kind: Kind | None = None
    """None: by extension."""
    side: list[str] = []
    """JSONL or Parquet files with captions, questions, answers for the media, joined by key."""
    fields: list[str] = ["text"]
    """LWM field specs; several: one is drawn for each record, deterministically from its index."""
    heldout: list[str] = []
    """Globs over the URLs: what matches is never trained on."""
    heldout_tail: float = Field(default=0.0, ge=0, lt=1)
    """Share of each video, from its end, that is never trained on: the future of what was seen."""
    max_frames: Positive | None = None
    """Frames a video of this source has at most; None: tokenize.max_frames."""


class TextTokenizer(Config):
    """The byte-pair vocabulary."""

    path: str = "package://mistral_common/data/tokenizer.model.v1"
    """A sentencepiece `.model` or a Hugging Face `tokenizer.json`."""


class VQGANTraining(Config):
    """Trains a small VQGAN on the run's own video and image sources (held-out objects left out)."""

    steps: Positive
    batch: Positive = 8
    lr: float = 1.5e-3
    fps: float = 30.0
    """Frames a second taken from video."""
    max_frames: Positive = 4096
    """Frames kept, sampled uniformly over the sources; they are memory-mapped, not held."""
    threads: Positive = 1
    """Compute threads; on cores that other work shares, two are slower than one."""
    checkpoint_steps: Positive = 100


class VisualTokenizer(Config):
    """The visual tokenizer: named weights, or a small one trained here."""

    config: Literal["lwm", "small"] | dict[str, int | list[int]] = "lwm"
    """`lwm`: 256 px, 8,192 codes of 64 dimensions, 146M parameters. `small`: 64 px, 2,048 codes, trained in minutes on
    two cores. Or the sizes of tokenization.vqgan.VQGANConfig one by one."""
    weights: str | None = None
    """A folder in diffusers' format, or LWM's released pickle."""
    train: VQGANTraining | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder's convolutions when tokenizing."""

    @model_validator(mode="after")
    def _is_whole(self) -> VisualTokenizer:
        if (self.weights is None) == (self.train is None):
            raise ValueError("give either vqgan.weights or vqgan.train, not both and not neither")
        try:
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

    fps: float = 4.0
    """Frames a second sampled from video."""
    max_frames: Positive = 900
    """Longer videos are sampled uniformly down to this many frames (LWM's rule)."""
    frames_per_document: Positive | None = None
    """A video is cut in documents of so many frames; None: one document a video."""
    chunk_frames: Positive = 32
    """Frames decoded at a time, hence the memory bound of a decoder."""
    partition_bytes: Positive = 64 * 2**20
    """Text objects are grouped in partitions of about so many bytes; a video is a partition of its own."""
    decode: Resources = Resources()
    encode: Resources = Resources()
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """The stage fails when more than this share of objects or records ends in quarantine."""


class Pack(Config):
    """Documents to shards of packed sequences."""

    window: Positive = 10_000
    """Documents that best-fit packing looks at together."""
    partition_tokens: Positive = 2**30
    """Documents are packed in partitions of about so many tokens."""
    sequences_per_shard: Positive = 1024
    pool: Resources = Resources()


class Model(Config):
    """The language model."""

    size: str | dict[str, int] = "debug"
    """A preset (7B, 1B, 200M, debug) or hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, ..."""
    init: str | None = None
    """A Hugging Face Llama folder or a released LWM checkpoint to start from; None: random weights by the seed."""


class TrainStage(Config):
    """One stage of the curriculum; it starts from the weights of the stage before."""

    name: Name
    context: Positive
    rope_theta: float = Field(gt=0)
    steps: Positive
    batch_tokens: Positive
    """Tokens of the global batch, over all data-parallel ranks and accumulation steps."""
    mixture: dict[str, float] = Field(min_length=1)
    """Share of the tokens by source."""
    objective: Objective
    lr: float = Field(gt=0)
    final_lr: float | None = None
    """None: constant after the warm-up; a number: cosine decay down to it."""
    warmup_steps: int = Field(default=0, ge=0)
    sp: Positive = 1
    """Sequence-parallel ranks that share a sequence by ring attention; the rest of the workers is data-parallel."""
    rows: Positive = 1
    """Sequences that one forward pass concatenates (short contexts leave a device idle)."""
    zero: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage of this stage; None: train.zero."""
    min_document_tokens: int = 0
    max_document_tokens: int | None = None
    """Only documents of these lengths (LWM: longer books in later stages)."""
    export: str | None = None
    """URL that the finished stage's Hugging Face checkpoint is copied to."""

    @property
    def sequences(self) -> int:
        """Packed sequences in the global batch."""
        return self.batch_tokens // self.context


class Train(Config):
    """The training engine, common to all stages."""

    workers: Positive = 1
    resources: Resources = Resources()
    zero: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    loss_chunk: Positive = 1024
    """Tokens whose logits exist at once."""
    activation_checkpointing: bool = False
    checkpoint_steps: Positive = 100
    keep_checkpoints: Positive = 2
    max_restarts: int = 3
    stages: list[TrainStage] = Field(min_length=1)


class Needle(Config):
    """Needle in a haystack: context x depth."""

    contexts: list[int] = Field(min_length=1)
    depths: Positive = 5
    rounds: Positive = 1


class Generation(Config):
    """Frames generated as continuation of a held-out clip and from text."""

    prompt_frames: Positive = 4
    frames: Positive = 4
    prompts: list[str] = []
    guidance: float = 1.0
    top_k: Positive = 1000
    temperature: float = 1.0


class Evaluate(Config):
    """What is measured at the end."""

    max_sequences: Positive = 64
    """Held-out sequences scored at most, per stage and source."""
    needle: Needle | None = None
    generation: Generation | None = None
    reconstructions: int = 8
    """Held-out frames shown beside their reconstruction."""
    resources: Resources = Resources()


class Recipe(Config):
    """The whole of what to run."""

    name: Name
    seed: int = 0
    storage: Storage
    sources: dict[Name, Source] = Field(min_length=1)
    text_tokenizer: TextTokenizer = TextTokenizer()
    vqgan: VisualTokenizer | None = None
    tokenize: Tokenize = Tokenize()
    pack: Pack = Pack()
    model: Model = Model()
    train: Train
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        vision = [name for name, source in self.sources.items() if any("vision" in spec for spec in source.fields)]
        if vision and self.vqgan is None:
            raise ValueError(f"sources.{vision[0]} has a vision field but the recipe has no vqgan; add one")
        names = [stage.name for stage in self.train.stages]
        if len(set(names)) < len(names):
            raise ValueError("train.stages: two stages have one name; give each its own")
        for index, stage in enumerate(self.train.stages):
            self._check_stage(f"train.stages.{index}", stage)
        self._check_evaluation(self.train.stages[-1].context)
        return self

    def _check_evaluation(self, context: int) -> None:
        """What is asked of the last model fits its context: known now rather than after weeks of training."""
        needle, generation = self.evaluate.needle, self.evaluate.generation
        if needle and max(needle.contexts) > context:
            raise ValueError(
                f"evaluate.needle.contexts has {max(needle.contexts)}, above the last context {context}; lower it"
            )
        if generation and self.vqgan:
            frames = generation.prompt_frames + generation.frames
            tokens = frames * (self.vqgan.sizes.codes_per_frame + 1)
            if tokens > context:
                raise ValueError(
                    f"evaluate.generation: {frames} frames are {tokens} tokens, more than the last stage's context "
                    f"{context}; lower prompt_frames or frames"
                )

    def _check_stage(self, key: str, stage: TrainStage) -> None:
        for source in stage.mixture:
            if source not in self.sources:
                raise ValueError(f"{key}.mixture names the source {source!r}, which sources does not define")
        if stage.batch_tokens % stage.context:
            raise ValueError(f"{key}.batch_tokens {stage.batch_tokens} is no multiple of its context {stage.context}")
        if self.train.workers % stage.sp:
            raise ValueError(
                f"{key}.sp {stage.sp} does not divide train.workers {self.train.workers}; "
                f"choose an sp that divides it or change the workers"
            )
        if stage.context % (2 * stage.sp):
            raise ValueError(f"{key}.context {stage.context} is no multiple of 2 x sp {stage.sp}")
        per_step = self.train.workers // stage.sp * stage.rows
        if stage.sequences % per_step:
            raise ValueError(
                f"{key}.batch_tokens gives {stage.sequences} sequences a step, which {self.train.workers // stage.sp} "
                f"data-parallel ranks of {stage.rows} row(s) cannot share evenly; make it a multiple of {per_step}"
            )
        if stage.warmup_steps >= stage.steps:
            raise ValueError(f"{key}.warmup_steps {stage.warmup_steps} leaves no step of its {stage.steps}")
