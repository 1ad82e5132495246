"""How a model is trained. Free of torch, so that a recipe, which has most of these keys, is read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from model.layers.kernels.interface import Kernels
from model.layers.memory_settings import MemorySettings
from storage.setting_types import Above0, AtLeast0, AtLeast2, Finite, OutputNeutral, Positive

Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Literal["all", "matrices"]
"""What the weight decay is on: all parameters, as LWM has it, or none of the vectors (the norms' weights)."""


@dataclass(frozen=True)
class TrainingSettings:
    """What is the same on any mesh. The defaults of the optimizer are LWM's (arXiv 2402.08268)."""

    zero: OutputNeutral[Literal[0, 1, 2, 3]] = 1
    """DeepSpeed's ZeRO stage: 0 replicates everything (fp32 only), 1 shards the optimizer state, 2 the gradients too,
    3 the weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights and optimizer state."""
    weight_decay: Finite[AtLeast0] = 0.1
    decay: Decay = "all"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Finite[Above0] = 1e-8
    clip_norm: Finite[AtLeast0] = 1.0
    """A gradient whose norm, over all parameters, is larger is scaled down to it; 0: none is, at any ZeRO stage."""
    loss_chunk: OutputNeutral[Positive] = 1024
    """Tokens whose logits exist at once."""
    memory: OutputNeutral[MemorySettings] = field(default_factory=MemorySettings)
    kernels: OutputNeutral[Kernels] = "torch"
    """What runs a layer's norms, rotary embedding and SwiGLU; it changes rounding alone. torch: a kernel for each
    operation. compile: each part fused by torch.compile, on CPU or GPU. liger: Liger Kernel's, on a GPU, by the
    optional package `ringworld[liger]`."""
    zero_group: OutputNeutral[AtLeast2 | None] = None
    """Of ZeRO 3: so many neighbouring ranks, such as those of a node, hold all weights among them, beside their share
    of the world's. Only the first forward pass after an update gathers weights from the whole world. None: every pass
    does."""

    def unfit_group(self, world: int | None = None) -> str | None:
        """What is wrong with `zero_group` at this ZeRO stage, and on so many ranks if given, or None."""
        if self.zero_group is None:
            return None
        if self.zero_group < 2:
            return f"zero_group must be 2 or more ranks, not {self.zero_group}; drop it"
        if self.zero != 3:
            return f"zero_group {self.zero_group} needs ZeRO stage 3, not {self.zero}; set zero: 3 or drop it"
        if world is not None and world % self.zero_group:
            workers = f"the {world} training workers"
            return f"zero_group {self.zero_group} does not divide {workers}; choose a divisor of {world}"
        return None


@dataclass(frozen=True)
class EngineSettings(TrainingSettings):
    """What one `TrainingEngine` is given. Raises ValueError on what contradicts itself."""

    grad_accum: int = 1
    """Micro-batches in one optimizer step on each rank."""
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization` section, e.g. bucket sizes."""

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero must be 0, 1, 2 or 3, not {self.zero}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", not {self.precision!r}')
        if self.zero == 0 and self.precision == "bf16":
            raise ValueError("zero 0 trains in fp32 only: choose zero 1 for bf16 with replicated weights")
        if self.decay not in ("all", "matrices"):
            raise ValueError(f'decay must be "all" or "matrices", not {self.decay!r}')
        if self.grad_accum < 1:
            raise ValueError(f"grad_accum must be 1 or more, not {self.grad_accum}")
        if wrong := self.memory.unfit_for(self.zero) or self.unfit_group():
            raise ValueError(wrong)
