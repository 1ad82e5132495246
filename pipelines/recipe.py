"""The recipe: one typed tree that says what to run, validated once, at the edge. recipe_file.py reads one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.attention import hardware
from model.attention.plan import Route
from model.attention.planner import LAYOUTS
from model.memory import Activations, MemorySettings
from pipelines.decoder.limits import Limits
from pipelines.recipe_checks import check_recipe
from tokenization.vqgan.config import VQGANConfig

Objective = Literal["text", "vision-text"]
Kind = Literal["video", "image", "text", "webdataset", "records"]
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


class EncoderResources(Resources):
    """A pool of encoders that grows from `min_workers` to `workers` while frames wait, and shrinks when none come."""

    min_workers: Positive = 1
    idle_seconds: float = Field(default=60.0, gt=0)
    """How long an encoder above `min_workers` may have nothing to do before it gives its place back."""

    @model_validator(mode="after")
    def _is_a_range(self) -> EncoderResources:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; raise workers")
        return self


class Source(Config):
    """One named source of raw objects."""

    urls: list[str] = Field(min_length=1)
    """fsspec URLs with globs. `package://NAME/path` is a file of an installed Python package."""
    kind: Kind | None = None
    """None: by extension. `webdataset`: tars of media with their `.json` and `.txt` (caption), as img2dataset and
    video2dataset write them. `records`: JSONL or Parquet whose records each name a medium, in the column `media`."""
    media: str | None = None
    """Column of JSONL or Parquet records that names each record's video or image by URL, absolute or relative to the
    file; the other columns (caption, question, answer, ...) are the record's fields beside `vision`."""
    side: list[str] = []
    """JSONL or Parquet files with captions, questions, answers for the media, joined by key."""
    fields: list[str] = ["text"]
    """LWM field specs; several: one is drawn for each record, deterministically from its index."""
    heldout: list[str] = []
    """Globs over the URLs and keys, of tars also over the samples' keys (TAR/KEY), of records over the URLs of their
    media: what matches is never trained on."""
    heldout_tail: float = Field(default=0.0, ge=0, lt=1)
    """Share of each video, from its end, that is never trained on: the future of what was seen."""
    max_frames: Positive | None = None
    """Frames a video of this source has at most; None: tokenize.max_frames."""

    @model_validator(mode="after")
    def _names_its_media(self) -> Source:
        if (self.kind == "records") and self.media is None:
            raise ValueError("kind records needs the key media, the column that names each record's video or image")
        if self.media is not None and self.kind not in (None, "records"):
            raise ValueError(f"media is of kind records, not {self.kind}; drop one of the two")
        return self


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
    """Frames decoded at a time."""
    decoder_memory_gib: float = Field(default=4.0, ge=0.5)
    """Memory of a process that decodes; a video or image that takes more is bad. 8K video takes 1, the largest images
    2.5."""
    decoder_cpu_seconds: Positive = 120
    """Processor time that decoding may take without reading on in its file; a video or image that takes more is bad."""
    partition_bytes: Positive = 64 * 2**20
    """Objects are grouped in partitions of about so many bytes; a video is a partition of its own, and so is a file of
    records that name media."""
    piece_seconds: float = Field(default=300.0, gt=0)
    """A longer video is decoded in pieces of so many seconds, by as many tasks, on as many nodes as there are."""
    in_flight_mib: Positive = 32
    """Frames that a decode task has under way to the encoders at most, in MiB; all decode tasks together have so many
    times more of them in Ray's object stores."""
    decode: Resources = Resources()
    encode: EncoderResources = EncoderResources()
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """The stage fails when more than this share of objects or records ends in quarantine."""

    @property
    def decoder_limits(self) -> Limits:
        """The limits as the decoder's own type."""
        return Limits(int(self.decoder_memory_gib * 2**30), self.decoder_cpu_seconds)


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


_SPEEDS = hardware.Hardware()


class Hardware(Config):
    """The machine as the planner of ring attention reckons with it, one trainer a rank; by default H100 nodes.

    It decides which plan is taken for the fastest, hence in which order sums are rounded, and nothing else.
    """

    flops: float = Field(default=_SPEEDS.flops, gt=0)
    """Floating-point operations a second that the attention kernel of one rank reaches on large blocks."""
    inside: float = Field(default=_SPEEDS.inside, gt=0)
    """Bytes a second between two ranks of a node, each way."""
    across: float = Field(default=_SPEEDS.across, gt=0)
    """Bytes a second between two ranks of different nodes, each way."""
    uplink: float | None = Field(default=_SPEEDS.uplink, gt=0)
    """Bytes a second of a whole node to all others, each way; None: every rank has `across` to itself."""
    latency: float = Field(default=_SPEEDS.latency, ge=0)
    """Seconds that a message costs the rank that sends or receives it, however short."""
    ranks_per_node: Positive = _SPEEDS.ranks_per_node
    """Neighbouring workers that share a node; a Ulysses degree never exceeds them."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Floating-point operations a second that one rank's device can do at most, by which MFU is reckoned; None: what is
    known of its GPU by name. It decides nothing."""

    def speeds(self) -> hardware.Hardware:
        """The same as the planner's own type."""
        return hardware.Hardware(**self.model_dump(exclude={"peak_flops"}))


class Attention(Config):
    """How a sequence is shared by its sp ranks, for those who know better than the planner; None: the fastest plan."""

    layout: str | None = None
    """Which tokens each rank holds: contiguous, zigzag, or shared-0.5% to shared-30%, which share each document over
    the fewest ranks that keep the work of all within so much of its mean."""
    ulysses: Positive | None = None
    """Neighbouring ranks that split the heads among them instead of the keys; divides sp and the model's kv heads."""
    route: Route | None = None
    """`direct` sends each rank the keys it needs, `relay` passes all keys on from neighbour to neighbour."""

    @field_validator("layout")
    @classmethod
    def _is_known(cls, layout: str | None) -> str | None:
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"{layout!r} is none of {', '.join(LAYOUTS)}; name one, or none for the planner's choice")
        return layout

    def unfit_for(self, kv_heads: int) -> str | None:
        """What is wrong with these choices for a model of so many kv heads, if anything."""
        if self.ulysses is None or kv_heads % self.ulysses == 0:
            return None
        return f"ulysses {self.ulysses} does not divide the model's {kv_heads} kv heads; choose a divisor"


class Memory(Config):
    """What training saves of memory, at a cost in time; no choice changes a gradient. `ringworld plan --memory` tells
    what each takes and which fit."""

    activations: Activations = "keep"
    """What is kept of a layer for its backward. keep: everything. mlp: norms and MLP are run again. all-but-attention:
    the layer's input and the attention's result, which is never run twice. full: the layer's input alone."""
    offload_activations: bool = False
    """What all-but-attention or full keep waits in host memory."""
    mlp_tile: Positive | None = None
    """Tokens that the MLP takes at once; None: all that a rank holds."""
    offload_optimizer: bool = False
    """fp32 weights and moments live on the host (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """The weights live on the host too (ZeRO 3)."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Memory:
        self.settings()
        return self

    def settings(self) -> MemorySettings:
        """The same as the engine's own type."""
        return MemorySettings(**self.model_dump())


class Wandb(Config):
    """Weights & Biases, by the optional package `ringworld[wandb]`; its key from `wandb login` or the environment."""

    project: str
    entity: str | None = None
    """User or team; None: the key's own."""
    mode: Literal["online", "offline", "disabled"] = "online"
    folder: str | None = None
    """Local folder on the first worker's node for its files; None: wandb's own choice."""


class TrainStage(Config):
    """One stage of the curriculum; it starts from the weights of the stage before."""

    name: Name
    context: Positive
    rope_theta: float = Field(gt=0)
    steps: Positive
    tokens: Positive | None = None
    """In place of `steps`: at least so many tokens, in whole batches."""
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
    attention: Attention | None = None
    """How those ranks share it in this stage; None: train.attention."""
    rows: Positive = 1
    """Sequences that one forward pass concatenates (short contexts leave a device idle)."""
    zero: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage of this stage; None: train.zero."""
    memory: Memory | None = None
    """What this stage saves of memory; None: train.memory."""
    min_document_tokens: int = 0
    max_document_tokens: int | None = None
    """Only documents of these lengths (LWM: longer books in later stages)."""
    export: str | None = None
    """URL that the finished stage's Hugging Face checkpoint is copied to."""

    @model_validator(mode="before")
    @classmethod
    def _count_steps(cls, values: Any) -> Any:
        """`tokens` is another way to say `steps`."""
        if not isinstance(values, dict) or values.get("tokens") is None:
            return values
        tokens, batch = values["tokens"], values.get("batch_tokens")
        if not isinstance(tokens, int) or not isinstance(batch, int) or batch <= 0:
            return {"steps": 1, **values}  # whichever is no number is told by its own key
        steps = -(-tokens // batch)
        if values.get("steps") not in (None, steps):
            raise ValueError(
                f"tokens {tokens} are {steps} steps of batch_tokens {batch}, not {values['steps']}; give one"
            )
        return {**values, "steps": steps}

    @property
    def sequences(self) -> int:
        """Packed sequences in the global batch."""
        return self.batch_tokens // self.context


class BadSteps(Config):
    """What to do about a step whose gradient is not finite or whose loss spikes; its update is never made."""

    action: Literal["skip", "rollback", "fail"] = "skip"
    """`skip` goes on with the next batch, `rollback` too, but from the last checkpoint, so that what led there is
    undone; `fail` ends the stage."""
    spike_sigmas: float | None = Field(default=None, gt=0)
    """A loss so many standard deviations above the mean of the last `window` is a spike; None: no loss is."""
    window: Positive = 100
    at_most: int = Field(default=20, ge=0)
    """Bad steps that a stage puts up with."""


class Train(Config):
    """The training engine, common to all stages."""

    workers: Positive = 1
    min_workers: Positive | None = None
    """With it a stage trains on as many workers, from so many to `workers`, as the cluster has room for, and goes on
    with more or fewer as nodes come and go; None: always on `workers`."""
    resources: Resources = Resources()
    zero: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "all"
    """What the weight decay is on: all parameters, as LWM has it, or none of the vectors (the norms' weights)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    loss_chunk: Positive = 1024
    """Tokens whose logits exist at once."""
    memory: Memory = Memory()
    bad_steps: BadSteps = BadSteps()
    checkpoint_steps: Positive = 100
    keep_checkpoints: Positive = 2
    """The newest ones stay. With 1, a damaged one has none before it to go back to."""
    max_restarts: int = Field(default=3, ge=0)
    """Failures of a worker, a node or the network without a checkpoint between them that a stage survives."""
    hang_seconds: float = Field(default=1800.0, gt=0)
    """A worker that has not been heard of, or that all others have waited for within a step, for so long is ended, and
    the stage goes on from its last checkpoint. A step must take less."""
    max_bad_shards: int = Field(default=0, ge=0)
    """Shards a stage goes on without when they are not what was written, each counted as lost. Above 0 all shards of a
    stage are re-hashed before its first step; at 0 the first corrupt sequence ends it."""
    shard_cache_gib: float = Field(default=0, ge=0)
    """Room on each node's local disk for shards from an object store, re-hashed as they arrive; worthwhile where a
    stage's shards fit. What does not fit is read sequence by sequence, as all is at 0."""
    tensorboard: bool = True
    """Keep TensorBoard's event files in each stage's folder, `tensorboard/`."""
    wandb: Wandb | None = None
    """Send each step's figures to Weights & Biases too."""
    hardware: Hardware = Hardware()
    attention: Attention = Attention()
    stages: list[TrainStage] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> Train:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; raise workers")
        return self

    def attention_of(self, stage: TrainStage) -> Attention:
        """The choices that hold in a stage: its own, else those for all stages."""
        return self.attention if stage.attention is None else stage.attention

    def memory_of(self, stage: TrainStage) -> Memory:
        """The choices that hold in a stage: its own, else those for all stages."""
        return self.memory if stage.memory is None else stage.memory

    def zero_of(self, stage: TrainStage) -> int:
        """The ZeRO stage that holds in a stage: its own, else that for all stages."""
        return self.zero if stage.zero is None else stage.zero


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
        check_recipe(self)
        return self
