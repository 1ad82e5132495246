"""The sizes of a VQGAN (LWM's, and a small one's for two cores), and how a small one is trained.

LWM's VQGAN (arXiv 2402.08268; the taming-transformers encoder and decoder without attention) is exactly diffusers'
`VQModel`: GroupNorm, SiLU, a middle block without attention, down by a 3x3 convolution of stride 2 padded right and
bottom, up by nearest neighbour and a 3x3 convolution, and the code of a cell is the nearest codebook entry in L2. This
file does not import torch, so that recipes are read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from storage.errors import UserError
from storage.setting_types import Above0, NeutralUntilSet, OutputNeutral, Positive


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of a VQGAN. Two VQGANs are interchangeable for a recipe when these are equal.

    resolution: side of a square frame in pixels. channels: width of each level, first level at full resolution, each
    next at half. res_blocks: residual blocks a level in the encoder (the decoder has one more). latent_channels:
    width between encoder and codebook projection. embed_dim: width of a codebook entry. norm_groups: groups of every
    GroupNorm.
    """

    resolution: int
    channels: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    embed_dim: int
    codebook_size: int
    norm_groups: int = 32

    def __post_init__(self) -> None:
        widths = self.channels if isinstance(self.channels, list | tuple) else [self.channels]
        object.__setattr__(self, "channels", tuple(widths))
        for key, value in asdict(self).items():
            sizes = value if key == "channels" else [value]
            if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
                raise UserError(f"vqgan: {key} is {value!r}; set vqgan.config.{key} to a number above 0")
        if self.resolution % self.down_factor:
            raise UserError(
                f"vqgan: resolution {self.resolution} is no multiple of {self.down_factor}, the factor of "
                f"{len(self.channels)} levels; change vqgan.resolution or vqgan.channels"
            )
        if any(width % self.norm_groups for width in self.channels):
            flaw = f"channels {list(self.channels)} are not all multiples of norm_groups {self.norm_groups}"
            raise UserError(f"vqgan: {flaw}; change vqgan.channels or vqgan.norm_groups")

    @classmethod
    def lwm(cls) -> VQGANConfig:
        """LWM's VQGAN: 256 px, 16x16 codes of an 8,192-entry codebook, 146,244,675 parameters."""
        return cls(
            resolution=256,
            channels=(128, 256, 256, 512, 768),
            res_blocks=2,
            latent_channels=64,
            embed_dim=64,
            codebook_size=8192,
        )

    @classmethod
    def small(cls, resolution: int = 64, codebook_size: int = 2048) -> VQGANConfig:
        """One that two cores can train in minutes: 2.7M parameters, 8 px a code, so 8x8 codes of a frame of 64 px.

        Its groups have several channels, as normalization would remove the brightness from groups of one.
        """
        return cls(
            resolution=resolution,
            channels=(16, 32, 64, 128),
            res_blocks=1,
            latent_channels=64,
            embed_dim=8,
            codebook_size=codebook_size,
            norm_groups=4,
        )

    @property
    def down_factor(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side of a frame."""
        return self.resolution // self.down_factor

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame."""
        return self.grid**2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for fingerprints and manifests."""
        return {**asdict(self), "channels": list(self.channels)}

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> VQGANConfig:
        """The sizes in a diffusers `VQModel` config. Raises UserError on another architecture than LWM's."""
        levels = len(config["block_out_channels"])
        needed = {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
            "norm_type": "group",
            "mid_block_add_attention": False,
        }
        for key, value in needed.items():
            found = list(config[key]) if isinstance(value, list) else config[key]
            if found != value:
                raise UserError(
                    f"vqgan weights: config.json has {key}={found!r} where Ringworld's VQGAN needs {value!r}; "
                    "choose weights of LWM's architecture"
                )
        return cls(
            resolution=config["sample_size"],
            channels=tuple(config["block_out_channels"]),
            res_blocks=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            embed_dim=config["vq_embed_dim"] or config["latent_channels"],
            codebook_size=config["num_vq_embeddings"],
            norm_groups=config["norm_num_groups"],
        )


@dataclass(frozen=True, kw_only=True)
class VQGANTraining:
    """Trains a small VQGAN on the run's own video and image sources, without held-out objects."""

    steps: Positive
    batch: Positive = 8
    """Frames a step."""
    lr: Above0 = 1.5e-3
    """Peak learning rate of AdamW, after a warm-up, falling to zero by a cosine."""
    fps: Above0 = 30.0
    """Frames a second taken from video."""
    max_frames: Positive = 4096
    """Frames kept, sampled uniformly over the sources; they are memory-mapped, not held."""
    threads: Positive = 1
    """Compute threads; on cores that other work shares, two are slower than one."""
    perceptual: NeutralUntilSet[Above0] = None
    """Weight of the perceptual distance (`perceptual.py`) beside the mean squared and absolute error; None: without.
    The released VQGANs were trained with 1."""
    adversarial: NeutralUntilSet[Above0] = None
    """Weight of the discriminator's gradient, relative to that of all that asks for the same frame; None: without.
    The released VQGANs were trained with 0.8."""
    checkpoint_steps: OutputNeutral[Positive] = 100


@dataclass(frozen=True, kw_only=True)
class TrainSettings(VQGANTraining):
    """The settings of a recipe, and those that no recipe changes."""

    seed: int = 0
    warmup: int = 50  # steps up to the peak learning rate
    commitment: float = 0.25  # weight of the term that keeps the latents near their codes
    decay: float = 0.98  # of the running averages of the codebook
    bf16: bool = True  # convolutions in bfloat16
    restart_below: float = 0.02  # a code whose running average of assignments in a batch is lower is moved
    # Shares of the steps:
    quantize_from: float = 0.4  # after which the decoder sees codes, no longer latents, while the codebook settles
    crop_until: float = 0.9  # that train on a random quarter of each frame only, which saves time
    restart_until: float = 0.8  # after which no code is moved
    adversarial_from: float = 0.5  # from which the discriminator is there: before, it would learn what is soon mended
    discriminator_lr: float = 5e-4
