"""How a small VQGAN is trained; recipes have the keys of `VQGANTraining`, and are read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from storage.setting_types import OutputNeutral, Positive


@dataclass(frozen=True, kw_only=True)
class VQGANTraining:
    """Trains a small VQGAN on the run's own video and image sources, without held-out objects."""

    steps: Positive
    batch: Positive = 8
    """Frames a step."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW, after a warm-up, falling to zero by a cosine."""
    fps: float = 30.0
    """Frames a second taken from video."""
    max_frames: Positive = 4096
    """Frames kept, sampled uniformly over the sources; they are memory-mapped, not held."""
    threads: Positive = 1
    """Compute threads; on cores that other work shares, two are slower than one."""
    checkpoint_steps: OutputNeutral[Positive] = 100


@dataclass(frozen=True, kw_only=True)
class TrainSettings(VQGANTraining):
    """The settings of a recipe, and those that no recipe changes."""

    seed: int = 0
    warmup: int = 50
    """Steps up to the peak learning rate."""
    commitment: float = 0.25
    """Weight of the term that keeps the latents near their codes."""
    decay: float = 0.98
    """Of the running averages of the codebook."""
    quantize_from: float = 0.4
    """Share of the steps after which the decoder sees codes; until then it sees latents, while the codebook settles."""
    crop_until: float = 0.9
    """Share of the steps that train on a random quarter of each frame only, which saves time."""
    restart_below: float = 0.02
    """A code whose running average of assignments in a batch is under this is moved."""
    restart_until: float = 0.8
    """Share of the steps after which no code is moved."""
    bf16: bool = True
    """Convolutions in bfloat16."""
