"""Trains a small VQGAN on the recipe's own frames, for recipes without VQGAN weights.

In: frames uint8 [n, H, W, 3]. Out: a `VQGAN`. The loss of the encoder and decoder is the mean squared plus the mean
absolute error plus a commitment term, with a straight-through gradient at the quantizer; as settings say, plus how
different frames look (`perceptual.py`) and how unreal (`adversary.py`). Each code is a running average
of the latents assigned to it (van den Oord et al. 2017, appendix A.1); a code with too few is moved onto a latent of
the current batch, without which only a tenth of the codebook stays in use. Every step is a pure function of (weights,
averages, seed, step number), so training resumes to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from storage.errors import UserError
from tokenization.codecs.vqgan.adversary import Adversary
from tokenization.codecs.vqgan.config import TrainSettings, VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan, nearest_codes, pixels_of, torch_threads
from tokenization.codecs.vqgan.perceptual import perceptual_distance, still_features

_FULL_CONTRAST = 0.45  # standard deviation of the pixels, in [-1, 1], of a clip in full light


class Trainer:
    """The state of a training run, and its step."""

    def __init__(self, config: VQGANConfig, settings: TrainSettings, draw_weights: np.ndarray | None = None) -> None:
        self.config = config
        self.settings = settings
        self.draw_weights = None if draw_weights is None else draw_weights / draw_weights.sum()
        self.step = 0
        # Not in channels-last format, in which the backward pass of group normalization would take 40% of a step.
        self.model: Any = build_vqgan(config, seed=settings.seed)
        self.codebook = self.model.quantize.embedding.weight.requires_grad_(False)
        self.wins = torch.zeros(config.codebook_size)
        self.sums = torch.zeros(config.codebook_size, config.embed_dim)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
        self.adversary = Adversary(settings.seed, settings.discriminator_lr) if settings.adversarial else None

    def train_step(self, frames: np.ndarray) -> dict[str, float]:
        """One optimizer step on frames drawn by (seed, step number); returns its metrics."""
        settings = self.settings
        generator = np.random.default_rng((settings.seed, self.step))
        pixels = self._draw(frames, generator)
        rise = min(1.0, (self.step + 1) / settings.warmup)
        lr = settings.lr * rise * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))
        self.optimizer.param_groups[0]["lr"] = lr
        with self._autocast():
            latents = self.model.encode(pixels).latents.float()
            if self.step == 0:
                self._move_codes(torch.arange(self.config.codebook_size), _cells(latents.detach()), generator)
            codes = nearest_codes(latents.detach(), self.codebook)
            quantized = self.codebook[codes].permute(0, 3, 1, 2)
            commitment = F.mse_loss(latents, quantized)
            quantize = self.step >= settings.quantize_from * settings.steps
            decoded = latents + (quantized - latents).detach() if quantize else latents
            sample = self.model.decode(decoded, force_not_quantize=True).sample
        if settings.perceptual or settings.adversarial:
            sample = sample.float()
        # Each in fp32 by itself, as without the further losses: in bfloat16 the bits of the gradient depend on it.
        error = F.mse_loss(sample.float(), pixels)
        reconstruction = error + F.l1_loss(sample.float(), pixels)
        figures = {}
        if settings.perceptual:
            with self._autocast():
                distance = perceptual_distance(sample, pixels, still_features())
            figures["perceptual"] = distance.item()
            reconstruction = reconstruction + settings.perceptual * distance
        loss = reconstruction + settings.commitment * commitment
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary and self.step >= settings.adversarial_from * settings.steps:
            figures |= self._backward_adversarial(pixels, sample, reconstruction, settings.commitment * commitment)
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        moved = self._update_codebook(_cells(latents.detach()), codes.flatten(), generator)
        self.step += 1
        return {
            "loss": loss.item(),
            "psnr": 10 * math.log10(4 / max(error.item(), 1e-12)),  # pixels span 2
            "live_codes": float((self.wins >= settings.restart_below).sum()),
            "moved_codes": float(moved),
            "lr": lr,
            **figures,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, for `torch.save` and `torch.load(weights_only=True)`."""
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "wins": self.wins,
            "sums": self.sums,
            "optimizer": self.optimizer.state_dict(),
            **({"adversary": self.adversary.state_dict()} if self.adversary else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. Raises UserError on a state of other sizes."""
        if state["config"] != self.config.to_dict():
            raise UserError(
                "vqgan training state: it has other sizes than the recipe's vqgan; delete it or restore them"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.wins.copy_(state["wins"])
        self.sums.copy_(state["sums"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16)

    def _backward_adversarial(
        self, pixels: torch.Tensor, sample: torch.Tensor, reconstruction: torch.Tensor, commitment: torch.Tensor
    ) -> dict[str, float]:
        """The backward pass of the generator and a step of the discriminator; returns their metrics."""
        assert self.adversary is not None
        assert self.settings.adversarial
        last = self.model.decoder.conv_out.weight
        with self._autocast():
            gradient, weight = self.adversary.gradient(sample, reconstruction, last, self.settings.adversarial)
        torch.autograd.backward([sample, commitment], [gradient, None])
        with self._autocast():
            loss = self.adversary.step(pixels, sample.detach(), self.settings.discriminator_lr)
        return {"adversarial_weight": weight, "discriminator_loss": loss}

    def _draw(self, frames: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
        """Pixels [batch, 3, h, w] of drawn frames, augmented by flips, contrast, brightness and crops."""
        count = self.settings.batch
        index = generator.choice(len(frames), count, p=self.draw_weights)
        pixels = pixels_of(torch.from_numpy(np.ascontiguousarray(frames[index])))
        for picture in pixels:
            if generator.random() < 0.5:
                picture.copy_(picture.flip(-1))
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        spread = pixels.std(dim=(1, 2, 3), keepdim=True)
        stretch = (_FULL_CONTRAST / spread).clamp(1, 3) ** _uniform(generator, 0, 1, count)
        contrast = stretch * _uniform(generator, math.log(0.7), math.log(1.4), count).exp()
        pixels = ((pixels - mean) * contrast + mean + _uniform(generator, -0.2, 0.2, count)).clamp(-1, 1)
        side = self.config.resolution // 2
        if side % self.config.down_factor or self.step >= self.settings.crop_until * self.settings.steps:
            return pixels
        corners = generator.integers(0, side + 1, (count, 2))
        return torch.stack([picture[:, y : y + side, x : x + side] for picture, (y, x) in zip(pixels, corners)])

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
        # High enough that the code is not moved again before the encoder uses it.
        self.wins[which] = 1.0
        self.sums[which] = self.codebook[which]


def _uniform(generator: np.random.Generator, low: float, high: float, count: int) -> torch.Tensor:
    """fp32 [count, 1, 1, 1]."""
    return torch.from_numpy(generator.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))


def _cells(latents: torch.Tensor) -> torch.Tensor:
    """[n, D, h, w] to [n*h*w, D], in the order of the codes."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def train_vqgan(
    frames: np.ndarray,
    config: VQGANConfig,
    settings: TrainSettings,
    *,
    weights: np.ndarray | None = None,
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
) -> VQGAN:
    """Train on frames uint8 [n, H, W, 3], which may be a memory map, and return the VQGAN.

    weights: float [n], how often each frame is drawn relative to the others (None: equally); with one over the length
    of its clip, all clips count equally. progress(step, metrics) is called after each step, counted from 1. save(state)
    is called every `checkpoint_steps`; on the same machine and with as many threads, a run that continues from `state`
    ends with the same weights. Raises UserError if there are no frames or they have another size.
    """
    if not len(frames):
        raise UserError("vqgan: no frames to train on; add clips to its sources or name weights in vqgan.weights")
    shape = frames[np.array([0])].shape[1:]
    if shape != (config.resolution, config.resolution, 3):
        raise UserError(
            f"vqgan: frames to train on are {shape}, vqgan.resolution is {config.resolution}; make them equal"
        )
    with torch_threads(settings.threads):
        trainer = Trainer(config, settings, weights)
        if state is not None:
            trainer.load_state_dict(state)
        while trainer.step < settings.steps:
            metrics = trainer.train_step(frames)
            progress(trainer.step, metrics)
            if trainer.step % settings.checkpoint_steps == 0 and trainer.step < settings.steps:
                save(trainer.state_dict())
    return VQGAN(trainer.model)
