"""The model and its training: the curriculum, the mesh, memory, what to do when something fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.attention.plan.hardware import CPU_CORES
from model.attention.plan.hardware import Hardware as Speeds
from model.attention.plan.options import Layout, Route
from model.layers.kernels.interface import Kernels
from model.layers.memory_settings import Activations, MemorySettings
from pipelines.recipe.base import Config, Name, Positive, Resources
from storage.settings import OutputNeutral

Objective = Literal["text", "vision-text"]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Model(Config):
    """The language model."""

    size: str | dict[str, int] = "debug"
    """A preset (7B, 1B, 200M, debug) or hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, ..."""
    init: str | None = None
    """A Hugging Face Llama folder or a released LWM checkpoint to start from; None: random weights by the seed."""


class Hardware(Config):
    """The machine as the planner of ring attention reckons with it, one trainer a rank.

    It decides which plan is taken for the fastest, hence in which order sums are rounded, and nothing else. What is not
    given is that of H100 nodes or, where trainers have no GPU, of a server's CPU cores.
    """

    flops: float | None = Field(default=None, gt=0)
    """Floating-point operations a second that the attention kernel of one rank reaches on large blocks."""
    inside: float | None = Field(default=None, gt=0)
    """Bytes a second between two ranks of a node, each way."""
    across: float | None = Field(default=None, gt=0)
    """Bytes a second between two ranks of different nodes, each way."""
    uplink: float | None = Field(default=None, gt=0)
    """Bytes a second of a whole node to all others, each way; None: every rank has `across` to itself."""
    latency: float | None = Field(default=None, ge=0)
    """Seconds that a message costs the rank that sends or receives it, however short."""
    ranks_per_node: Positive | None = None
    """Neighbouring workers that share a node; a Ulysses degree never exceeds them."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Floating-point operations a second that one rank's device can do at most, by which MFU is reckoned; None: what is
    known of its GPU by name. It decides nothing."""

    def speeds(self, on_gpu: bool) -> Speeds:
        """The same as the planner's own type."""
        given = self.model_dump(exclude={"peak_flops"}, exclude_none=True)
        return replace(Speeds() if on_gpu else CPU_CORES, **given)


class Attention(Config):
    """How a sequence is shared by its sp ranks, for those who know better than the planner; None: the fastest plan."""

    layout: Layout | None = None
    """Which tokens each rank holds: contiguous, zigzag, or shared-0.5% to shared-30%, which share each document over
    the fewest ranks that keep the work of all within so much of its mean."""
    ulysses: Positive | None = None
    """Neighbouring ranks that split the heads among them instead of the keys; divides sp and the model's kv heads."""
    route: Route | None = None
    """`direct` sends each rank the keys it needs, `relay` passes all keys on from neighbour to neighbour."""

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
    rope_theta: Above0
    steps: Positive
    tokens: OutputNeutral[Positive | None] = None
    """In place of `steps`: at least so many tokens, in whole batches."""
    batch_tokens: Positive
    """Tokens of the global batch, over all data-parallel ranks and accumulation steps."""
    mixture: dict[str, AtLeast0] = Field(min_length=1)
    """Share of the tokens by source, on any scale."""
    objective: Objective
    lr: Above0
    final_lr: AtLeast0 | None = None
    """None: constant after the warm-up; a number: cosine decay down to it."""
    warmup_steps: int = Field(default=0, ge=0)
    sp: OutputNeutral[Positive] = 1
    """Sequence-parallel ranks that share a sequence by ring attention; the rest of the workers is data-parallel."""
    attention: OutputNeutral[Attention | None] = None
    """How those ranks share it in this stage; None: train.attention."""
    rows: OutputNeutral[Positive] = 1
    """Sequences that one forward pass concatenates (short contexts leave a device idle)."""
    zero: OutputNeutral[Literal[0, 1, 2, 3] | None] = None
    """DeepSpeed ZeRO stage of this stage; None: train.zero."""
    memory: OutputNeutral[Memory | None] = None
    """What this stage saves of memory; None: train.memory."""
    min_document_tokens: int = Field(default=0, ge=0)
    max_document_tokens: Positive | None = None
    """Only documents of these lengths (LWM: longer books in later stages)."""
    export: OutputNeutral[str | None] = None
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

    workers: OutputNeutral[Positive] = 1
    min_workers: OutputNeutral[Positive | None] = None
    """With it a stage trains on as many workers, from so many to `workers`, as the cluster has room for, and goes on
    with more or fewer as nodes come and go; None: always on `workers`."""
    resources: OutputNeutral[Resources] = Resources()
    zero: OutputNeutral[Literal[0, 1, 2, 3]] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    weight_decay: AtLeast0 = 0.1
    decay: Literal["all", "matrices"] = "all"
    """What the weight decay is on: all parameters, as LWM has it, or none of the vectors (the norms' weights)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Above0 = 1e-8
    clip_norm: AtLeast0 = 1.0
    """A gradient whose norm, over all parameters, is larger is scaled down to it; 0: none is, at any ZeRO stage."""
    loss_chunk: OutputNeutral[Positive] = 1024
    """Tokens whose logits exist at once."""
    memory: OutputNeutral[Memory] = Memory()
    kernels: OutputNeutral[Kernels] = "torch"
    """What runs a layer's norms, rotary embedding and SwiGLU; it changes rounding alone. torch: a kernel for each
    operation. compile: each part fused by torch.compile, on CPU or GPU. liger: Liger Kernel's, on a GPU, by the
    optional package `ringworld[liger]`."""
    bad_steps: BadSteps = BadSteps()
    checkpoint_steps: OutputNeutral[Positive] = 100
    keep_checkpoints: OutputNeutral[Positive] = 2
    """The newest ones stay. With 1, a damaged one has none before it to go back to."""
    max_restarts: OutputNeutral[int] = Field(default=3, ge=0)
    """Failures of a worker, a node or the network without a checkpoint between them that a stage survives."""
    hang_seconds: OutputNeutral[float] = Field(default=1800.0, gt=0)
    """A worker that has not been heard of, or that all others have waited for, for so long is ended, and the stage goes
    on from its last checkpoint. A step must take less, and so must each piece of a start, a save or an export."""
    grace_seconds: OutputNeutral[float] = Field(default=25.0, ge=0)
    """At SIGTERM, how long a stage may take to end its step and commit a checkpoint before the run ends without one.
    What sends SIGTERM has to wait longer than that before it kills. 0: the run ends at once."""
    max_bad_shards: OutputNeutral[int] = Field(default=0, ge=0)
    """Shards a stage goes on without when they are not what was written, each counted as lost. Above 0 all shards of a
    stage are re-hashed before its first step; at 0 the first corrupt sequence ends it."""
    shard_cache_gib: OutputNeutral[float] = Field(default=0, ge=0)
    """Room on each node's local disk for shards from an object store, re-hashed as they arrive; worthwhile where a
    stage's shards fit. What does not fit is read sequence by sequence, as all is at 0."""
    tensorboard: OutputNeutral[bool] = True
    """Keep TensorBoard's event files in each stage's folder, `tensorboard/`."""
    wandb: OutputNeutral[Wandb | None] = None
    """Send each step's figures to Weights & Biases too."""
    deterministic: OutputNeutral[bool] = False
    """On GPUs, sum in the same order every time, at some cost: a run is then the same to the bit as one like it, as on
    CPUs it always is."""
    hardware: OutputNeutral[Hardware] = Hardware()
    attention: OutputNeutral[Attention] = Attention()
    stages: OutputNeutral[list[TrainStage]] = Field(min_length=1)
    """The curriculum. Each says for itself what its model depends on."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Train:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; raise workers")
        return self

    def speeds(self) -> Speeds:
        """Of the machine, as the planner reckons with it."""
        return self.hardware.speeds(on_gpu=self.resources.gpus > 0)

    def attention_of(self, stage: TrainStage) -> Attention:
        """The choices that hold in a stage: its own, else those for all stages."""
        return self.attention if stage.attention is None else stage.attention

    def memory_of(self, stage: TrainStage) -> Memory:
        """The choices that hold in a stage: its own, else those for all stages."""
        return self.memory if stage.memory is None else stage.memory

    def zero_of(self, stage: TrainStage) -> int:
        """The ZeRO stage that holds in a stage: its own, else that for all stages."""
        return self.zero if stage.zero is None else stage.zero
