"""The model and its training: the curriculum, the mesh, memory, what to do when something fails."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from model.attention.plan.hardware import CPU_CORES, Hardware
from model.attention.plan.options import AttentionOptions
from model.layers.memory_settings import MemorySettings
from model.llama.sizes import llama_sizes
from model.training.settings import TrainingSettings
from pipelines.recipe.base import Config, Resources, user_error_as_value_error
from pipelines.recipe.data import PackedData
from storage.setting_types import Above0, AtLeast0, AtLeast2, Count, Finite, OutputNeutral, Positive, Text


class Model(Config):
    """The language model."""

    size: str | dict[str, int | float] = "debug"
    """A preset (7B, 1B, 200M, debug) or hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, ..."""
    init: Text | None = None
    """A Hugging Face Llama folder or a released LWM checkpoint to start from; None: random weights by the seed."""

    @model_validator(mode="after")
    def _has_sizes(self) -> Model:
        with user_error_as_value_error():
            llama_sizes(self.size)
        return self


class Wandb(Config):
    """Weights & Biases, by the optional package `ringworld[wandb]`; its key from `wandb login` or the environment."""

    project: str
    entity: str | None = None
    """User or team; None: the key's own."""
    mode: Literal["online", "offline", "disabled"] = "online"
    folder: str | None = None
    """Local folder on the first worker's node for its files; None: wandb's own choice."""


class TrainStage(PackedData):
    """One stage of the curriculum; it starts from the weights of the stage before."""

    rope_theta: Finite[Above0]
    steps: Positive
    tokens: OutputNeutral[Positive | None] = None
    """In place of `steps`: at least so many tokens, in whole batches."""
    batch_tokens: Positive
    """Tokens of the global batch, over all data-parallel ranks and accumulation steps."""
    mixture: dict[str, Finite[AtLeast0]] = Field(min_length=1)
    """Share of the tokens by source, on any scale."""
    lr: Finite[Above0]
    final_lr: Finite[AtLeast0] | None = None
    """None: constant after the warm-up; a number: cosine decay down to it."""
    warmup_steps: Count = 0
    sp: OutputNeutral[Positive] = 1
    """Sequence-parallel ranks that share a sequence by ring attention; the rest of the workers is data-parallel."""
    attention: OutputNeutral[AttentionOptions | None] = None
    """How those ranks share it in this stage; None: train.attention."""
    rows: OutputNeutral[Positive] = 1
    """Sequences that one forward pass concatenates (short contexts leave a device idle)."""
    zero: OutputNeutral[Literal[0, 1, 2, 3] | None] = None
    """DeepSpeed ZeRO stage of this stage; None: train.zero."""
    zero_group: OutputNeutral[AtLeast2 | None] = None
    """Ranks that hold all weights among them in this stage; None: train.zero_group."""
    memory: OutputNeutral[MemorySettings | None] = None
    """What this stage saves of memory; None: train.memory."""
    export: OutputNeutral[Text | None] = None
    """URL to which the finished stage's model is exported, as `ringworld export` does, in the place of another that was
    exported there."""

    @model_validator(mode="before")
    @classmethod
    def _count_steps(cls, values: Any) -> Any:
        """`tokens` is another way to say `steps`."""
        if not isinstance(values, dict) or values.get("tokens") is None:
            return values
        tokens, batch = values["tokens"], values.get("batch_tokens")
        if not isinstance(tokens, int) or not isinstance(batch, int) or batch <= 0:
            return {"steps": 1, **values}  # a key that is no number is refused by its own type
        steps = -(-tokens // batch)
        if values.get("steps") not in (None, steps):
            raise ValueError(
                f"tokens {tokens} are {steps} steps of batch_tokens {batch}, not {values['steps']}; give one"
            )
        return {**values, "steps": steps}

    @property
    def source_names(self) -> list[str]:
        """See `PackedData`."""
        return sorted(self.mixture)

    @property
    def sequences(self) -> int:
        """Packed sequences in the global batch."""
        return self.batch_tokens // self.context


class BadSteps(Config):
    """What to do about a step whose gradient is not finite or whose loss spikes; its update is never made."""

    action: Literal["skip", "rollback", "fail"] = "skip"
    """`skip` goes on with the next batch, `rollback` too, but from the last checkpoint, so that what led there is
    undone; `fail` ends the stage."""
    spike_sigmas: Above0 | None = None
    """A loss so many standard deviations above the mean of the last `window` is a spike; None: no loss is."""
    window: Positive = 100
    at_most: Count = 20
    """Bad steps that a stage tolerates."""


class HeldoutWhileTraining(Config):
    """The loss of held-out sequences while training goes on, by which the best checkpoint is known and kept."""

    steps: Positive
    """It is measured after every so many steps, and after a stage's last. One of it and `train.checkpoint_steps` is a
    multiple of the other."""
    max_sequences: Positive = 8
    """Held-out sequences of each source at most, the same ones every time, spread evenly over those that there are."""
    sample_tokens: Count = 0
    """With each measurement, so many tokens are drawn after the beginning of each source's first held-out document and
    kept in `metrics/`. Below ZeRO 3, where a worker has all weights."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Train(TrainingSettings):
    """The training engine, common to all stages: beside `TrainingSettings`, on what it runs and what it withstands."""

    workers: OutputNeutral[Positive] = 1
    min_workers: OutputNeutral[Positive | None] = None
    """With it a stage trains on as many workers, from so many to `workers`, as the cluster has room for, and goes on
    with more or fewer as nodes come and go; None: always on `workers`."""
    resources: OutputNeutral[Resources] = Resources()
    bad_steps: BadSteps = BadSteps()
    checkpoint_steps: OutputNeutral[Positive] = 100
    keep_checkpoints: OutputNeutral[Positive] = 2
    """The newest ones stay, and with `heldout` the one of least held-out loss. With 1, a damaged one has none before it
    to go back to."""
    heldout: OutputNeutral[HeldoutWhileTraining | None] = None
    """None: held-out loss is measured by the evaluation alone, and no checkpoint is known to be the best."""
    max_restarts: OutputNeutral[Count] = 3
    """Failures of a worker, a node or the network without a checkpoint between them that a stage survives."""
    hang_seconds: OutputNeutral[Above0] = 1800.0
    """A worker that has not been heard of, or that all others have waited for, for so long is ended, and the stage goes
    on from its last checkpoint. A step must take less, and so must each piece of a start, a save or an export."""
    grace_seconds: OutputNeutral[AtLeast0] = 25.0
    """At SIGTERM, how long a stage may take to end its step and commit a checkpoint before the run ends without one.
    What sends SIGTERM has to wait longer than that before it kills. 0: the run ends at once."""
    max_bad_shards: OutputNeutral[Count] = 0
    """Shards a stage goes on without when they are not what was written, each counted as lost. Above 0 all shards of a
    stage are re-hashed before its first step; at 0 the first corrupt sequence ends it."""
    shard_cache_gib: OutputNeutral[AtLeast0] = 0
    """Room on each node's local disk for shards from an object store, re-hashed as they arrive; worthwhile where a
    stage's shards fit. What does not fit is read sequence by sequence, as all is at 0."""
    tensorboard: OutputNeutral[bool] = True
    """Keep TensorBoard's event files in each stage's folder, `tensorboard/`."""
    wandb: OutputNeutral[Wandb | None] = None
    """Send each step's figures to Weights & Biases too."""
    deterministic: OutputNeutral[bool] = False
    """On GPUs, sum in the same order every time, at some cost: a run is then the same to the bit as one like it, as on
    CPUs it always is."""
    hardware: OutputNeutral[Annotated[Hardware, Field(validate_default=True)]] = CPU_CORES
    """What is not given is that of H100 nodes or, where trainers have no GPU, of a server's CPU cores."""
    attention: OutputNeutral[AttentionOptions] = AttentionOptions()
    stages: OutputNeutral[Annotated[list[TrainStage], Field(min_length=1)]]
    """The curriculum. Each stage declares what its own model depends on."""

    @field_validator("hardware", mode="before")
    @classmethod
    def _assume_what_is_not_given(cls, given: Any, info: ValidationInfo) -> Any:
        resources = info.data.get("resources")
        assumed = Hardware() if resources is not None and resources.gpus else CPU_CORES
        if isinstance(given, dict):
            return {**asdict(assumed), **{key: value for key, value in given.items() if value is not None}}
        return assumed if given is CPU_CORES else given

    @model_validator(mode="after")
    def _is_a_range(self) -> Train:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; raise workers")
        return self

    @model_validator(mode="after")
    def _measures_checkpoints(self) -> Train:
        if self.heldout is not None:
            few, many = sorted((self.heldout.steps, self.checkpoint_steps))
            if many % few:
                raise ValueError(
                    f"heldout.steps {self.heldout.steps} and checkpoint_steps {self.checkpoint_steps}: neither is a "
                    f"multiple of the other, so that few checkpoints would have a held-out loss; change one"
                )
        return self

    def for_stage(self, stage: TrainStage) -> Train:
        """These settings with the stage's own in their place, where it has any."""
        own = {key: getattr(stage, key) for key in ("attention", "memory", "zero", "zero_group")}
        return replace(self, **{key: value for key, value in own.items() if value is not None})
