"""Train a small VQGAN on the recipe's own frames, for runs that name no weights.

In: frames uint8 [n, H, W, 3]. Out: a `VQGAN`. The encoder and decoder learn by mean squared plus mean absolute error
and a commitment term, straight through the quantizer; the codebook is no parameter but a running average of the latents
each code won (van den Oord et al. 2017, appendix A.1), and a code that wins too little is moved onto a latent of the
current batch. Without that restart a tenth of the codebook survives.

Every step is a pure function of (weights, statistics, seed, step number), so a saved state resumes to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from storage.errors import UserError
from tokenization.codecs.vqgan.architecture import build_vqgan
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, nearest_codes, pixels_of, torch_threads
from tokenization.codecs.vqgan.settings import TrainSettings

_LIVELY = 0.45  # standard deviation of the pixels, which span 2, of a clip in full light


class Frames(Protocol):
    """Frames uint8 [n, H, W, 3] that can be drawn by index: an array, a memory map, or anything that acts like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...


class Trainer:
    """The state of one training run and its single step."""

    def __init__(self, config: VQGANConfig, settings: TrainSettings, draw_weights: np.ndarray | None = None) -> None:
        self.config = config
        self.settings = settings
        self.draw_weights = None if draw_weights is None else draw_weights / draw_weights.sum()
        self.step = 0
        # Not channels last, as in `VQGAN`: there the backward of group normalisation alone takes 40% of a step.
        self.model: Any = build_vqgan(config, seed=settings.seed)
        self.codebook = self.model.quantize.embedding.weight.requires_grad_(False)
        self.wins = torch.zeros(config.codebook_size)
        self.sums = torch.zeros(config.codebook_size, config.embed_dim)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
        )

    def train_step(self, frames: Frames) -> dict[str, float]:
        """One optimizer step on frames drawn by (seed, step number); returns its metrics."""
        generator = np.random.default_rng((self.settings.seed, self.step))
        pixels = self._draw(frames, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            latents = self.model.encode(pixels).latents.float()
            if self.step == 0:
                self._move_codes(torch.arange(self.config.codebook_size), _cells(latents.detach()), generator)
            codes = nearest_codes(latents.detach(), self.codebook)
            quantized = self.codebook[codes].permute(0, 3, 1, 2)
            commitment = F.mse_loss(latents, quantized)
            if self.step >= self.settings.quantize_from * self.settings.steps:
                decoded = latents + (quantized - latents).detach()
            else:
                decoded = latents
            sample = self.model.decode(decoded, force_not_quantize=True).sample
        error = F.mse_loss(sample.float(), pixels)
        loss = error + F.l1_loss(sample.float(), pixels) + self.settings.commitment * commitment
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        moved = self._update_codebook(_cells(latents.detach()), codes.flatten(), generator)
        self.step += 1
        return {
            "loss": loss.item(),
            "psnr": 10 * math.log10(4 / max(error.item(), 1e-12)),  # pixels span 2
            "live_codes": float((self.wins >= self.settings.restart_below).sum()),
            "moved_codes": float(moved),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; `torch.save` writes it and `torch.load(weights_only=True)` reads it."""
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "wins": self.wins,
            "sums": self.sums,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. Raises UserError if it was made with other sizes."""
        if state["config"] != self.config.to_dict():
            raise UserError(
                "vqgan training state: made with other sizes than the recipe's vqgan; delete it or restore them"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.wins.copy_(state["wins"])
        self.sums.copy_(state["sums"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _draw(self, frames: Frames, generator: np.random.Generator) -> torch.Tensor:
        """Pixels [batch, 3, h, w] of drawn frames, changed so that a few clips stand for more than themselves."""
        count = self.settings.batch
        index = generator.choice(len(frames), count, p=self.draw_weights)
        pixels = pixels_of(torch.from_numpy(np.ascontiguousarray(frames[index])))
        for picture in pixels:
            if generator.random() < 0.5:
                picture.copy_(picture.flip(-1))
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        spread = pixels.std(dim=(1, 2, 3), keepdim=True)
        stretch = (_LIVELY / spread).clamp(1, 3) ** _uniform(generator, 0, 1, count)
        contrast = stretch * _uniform(generator, math.log(0.7), math.log(1.4), count).exp()
        pixels = ((pixels - mean) * contrast + mean + _uniform(generator, -0.2, 0.2, count)).clamp(-1, 1)
        side = self.config.resolution // 2
        if side % self.config.down_factor or self.step >= self.settings.crop_until * self.settings.steps:
            return pixels
        corners = generator.integers(0, side + 1, (count, 2))
        crops = [picture[:, y : y + side, x : x + side] for picture, (y, x) in zip(pixels, corners)]
        return torch.stack(crops)

    def _learning_rate(self) -> float:
        settings = self.settings
        rise = min(1.0, (self.step + 1) / settings.warmup)
        return settings.lr * rise * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))

    @torch.no_grad()
    def _update_codebook(self, cells: torch.Tensor, codes: torch.Tensor, generator: np.random.Generator) -> int:
        decay, size = self.settings.decay, self.config.codebook_size
        self.wins.lerp_(torch.bincount(codes, minlength=size).float(), 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, cells), 1 - decay)
        alive = self.wins >= self.settings.restart_below
        self.codebook[alive] = self.sums[alive] / self.wins[alive, None]
        if self.step >= self.settings.restart_until * self.settings.steps:
            return 0
        dead = torch.nonzero(~alive).flatten()
        self._move_codes(dead, cells, generator)
        return len(dead)

    @torch.no_grad()
    def _move_codes(self, which: torch.Tensor, cells: torch.Tensor, generator: np.random.Generator) -> None:
        drawn = generator.choice(len(cells), len(which), replace=len(which) > len(cells))
        self.codebook[which] = cells[torch.from_numpy(drawn)]
        # As if it had won often enough to stay for a while: time for the encoder to find it.
        self.wins[which] = 1.0
        self.sums[which] = self.codebook[which]


def _uniform(generator: np.random.Generator, low: float, high: float, count: int) -> torch.Tensor:
    """fp32 [count, 1, 1, 1]."""
    return torch.from_numpy(generator.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))


def _cells(latents: torch.Tensor) -> torch.Tensor:
    """[n, D, h, w] to [n*h*w, D], in the order of the codes."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def train_vqgan(
    frames: Frames,
    config: VQGANConfig,
    settings: TrainSettings,
    *,
    weights: np.ndarray | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> VQGAN:
    """Train on frames uint8 [n, H, W, 3] and return the VQGAN.

    weights: float [n], how often each frame is drawn relative to the others (None: equally); one over the length of its
    clip lets a short clip count as much as a long one.
    progress(step, metrics) is called after each step, steps counting from 1. save(state) is called every
    `checkpoint_steps`; a run given that `state` ends with the same weights, bit for bit, as one that was never
    interrupted (same machine and thread count). Raises UserError if there are no frames or they are of another size.
    """
    if not len(frames):
        raise UserError(
            "vqgan: no frames to train on; add clips to the sources it trains on or name weights in vqgan.weights"
        )
    shape = frames[np.array([0])].shape[1:]
    if shape != (config.resolution, config.resolution, 3):
        raise UserError(
            f"vqgan: frames of {shape} to train on but vqgan.resolution is {config.resolution}; make them equal"
        )
    with torch_threads(settings.threads):
        trainer = Trainer(config, settings, weights)
        if state is not None:
            trainer.load_state_dict(state)
        while trainer.step < settings.steps:
            metrics = trainer.train_step(frames)
            if progress is not None:
                progress(trainer.step, metrics)
            if save is not None and trainer.step % settings.checkpoint_steps == 0 and trainer.step < settings.steps:
                save(trainer.state_dict())
    return VQGAN(trainer.model)
