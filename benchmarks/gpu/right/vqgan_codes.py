"""The codes of the VQGAN's encoder on the card: bf16 against fp32, fp32 against fp64, and one batch against another.

Pictures, no noise. That codes of bf16 and fp32 differ somewhere is no fault: where two entries are nearly as near, the
latents' rounding decides. So three things are held apart: the latents' error, which rounding bounds; that each code is
the nearest entry to the latents in hand, which is exact; and the share of codes that agree, which follows from both and
from how the entries lie (see `benchmarks.gpu.vqgans`). What promises the same codes, other batches, memory formats and
compiled encoders of one precision, has to give them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.part import Bench
from benchmarks.gpu.pictures import pictures
from benchmarks.gpu.vqgans import TINY, agreement, compiled, latents_of, seeded_model, spread_codebook, spread_error
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, nearest_codes, pixels_of

BATCH = 32
"""As `benchmarks.gpu.fast.vqgan` compiles it too, which then finds it in inductor's cache."""
FP32_LIMIT = 1e-4
"""Error of fp32 latents, over their spread."""
BF16_LIMIT = 0.04
"""Error of bf16 latents, over their spread; on a CPU it is 0.026 with LWM's sizes."""
BF16_AGREE = 0.9
"""Share of codes that bf16 and fp32 have in common; on a CPU it is 0.949 with LWM's sizes."""
SAME = 0.999
"""Share that agrees where only the order of fp32 sums differs: a tie may fall either way."""
TIE = 1e-5
"""Relative difference of two scores within which fp32 may choose either entry."""


def run(bench: Bench) -> None:
    """See the module; in order of worth."""
    config = bench.size(VQGANConfig.lwm(), TINY)
    batch, count = bench.size((BATCH, 2 * BATCH), (2, 8))
    model = seeded_model(config)
    exact, fast = (
        VQGAN(model, device=bench.device, batch_size=batch, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    spread_codebook(exact, pictures(count, config.resolution, seed=1))
    frames = pictures(count, config.resolution, seed=2)
    codes, fast_codes = exact.encode(frames), fast.encode(frames)
    latents, fast_latents = latents_of(exact, frames), latents_of(fast, frames)

    error, agree = spread_error(fast_latents, latents), agreement(fast_codes, codes)
    bench.check("bf16 latents: error over fp32's spread", error, at_most=BF16_LIMIT)
    bench.check("bf16 codes: share that fp32 has too", agree, at_least=BF16_AGREE)
    bench.check("different codes of the pictures", len(np.unique(codes)), at_least=bench.size(400, 16))
    for name, at, found in (("fp32", latents, codes), ("bf16", fast_latents, fast_codes)):
        bench.check(f"{name} codes that are not the nearest entry", _not_nearest(at, found, exact.codebook), at_most=0)
    for name, vqgan, found in (("fp32", exact, codes), ("bf16", fast, fast_codes)):
        bench.check(f"{name} codes that other batches change", _changed(vqgan, frames, found), at_most=0)
    few = bench.size(8, 4)
    _against_fp64(bench, exact, frames[:few], latents[:few], codes[:few])

    with _contiguous(model):
        bench.check(
            "contiguous weights, fp32: share of the same codes", agreement(exact.encode(frames), codes), at_least=SAME
        )
    _compiled(bench, compiled(model, bench.on_cuda), frames, codes, latents, (error, agree))


def _compiled(
    bench: Bench, model: Any, frames: np.ndarray, codes: np.ndarray, latents: Tensor, eager: tuple[float, float]
) -> None:
    """eager: the error of bf16 latents, and the share of bf16 codes that fp32 has too."""
    if bench.left < bench.size(15, 1):
        return bench.skip("compiled", "its time is up")
    batch = bench.size(BATCH, 2)
    exact = VQGAN(model, device=bench.device, batch_size=batch)
    bench.check("compiled, fp32: share of the same codes", agreement(exact.encode(frames), codes), at_least=SAME)
    if bench.left < bench.size(10, 1):
        return bench.skip("compiled", "bf16: its time is up")
    fast = VQGAN(model, device=bench.device, batch_size=batch, dtype=torch.bfloat16)
    error, agree = spread_error(latents_of(fast, frames), latents), agreement(fast.encode(frames), codes)
    bench.check("compiled, bf16: error over that of eager bf16", error / eager[0], at_most=1.5)
    bench.check("compiled, bf16: share of codes that fp32 has too", agree, at_least=eager[1] - 0.02)
    return None


def _not_nearest(latents: Tensor, codes: np.ndarray, codebook: Tensor) -> int:
    """How many codes have a score below the best by more than a tie, by fp64 over all entries."""
    entries = codebook.double()
    wrong = 0
    for frame, found in zip(latents.flatten(2).mT.double(), torch.from_numpy(codes).to(latents.device)):
        scores = frame @ entries.T - entries.square().sum(1) / 2
        chosen = scores.gather(1, found.long().unsqueeze(1)).squeeze(1)
        scale = frame.norm(dim=1) * entries.norm(dim=1).max()
        wrong += int((scores.amax(1) - chosen > TIE * scale).sum())
    return wrong


def _changed(vqgan: VQGAN, frames: np.ndarray, codes: np.ndarray) -> int:
    """How many codes differ where the frames come in another order, and in batches that are not full."""
    order = np.random.default_rng(0).permutation(len(frames))
    shuffled = vqgan.encode(frames[order])
    first = vqgan.batch_size - 1
    pieces = np.concatenate([vqgan.encode(frames[:first]), vqgan.encode(frames[first : first + 1])])
    return int((shuffled != codes[order]).sum() + (pieces != codes[: first + 1]).sum())


def _against_fp64(bench: Bench, vqgan: VQGAN, frames: np.ndarray, latents: Tensor, codes: np.ndarray) -> None:
    model = copy.deepcopy(vqgan.model).double()
    with torch.inference_mode():
        exact = model.encode(pixels_of(torch.from_numpy(frames).to(vqgan.device)).double()).latents
    bench.check("fp32 latents: error over fp64's spread", spread_error(latents, exact), at_most=FP32_LIMIT)
    nearest = nearest_codes(exact, vqgan.codebook).flatten(1).cpu().numpy()
    bench.check("fp32 codes: share that fp64 has too", agreement(codes, nearest), at_least=SAME)


@contextmanager
def _contiguous(model: Any) -> Iterator[None]:
    """Within it weights are not in channels_last, in which the product has them."""
    model.to(memory_format=torch.contiguous_format)
    yield
    model.to(memory_format=torch.channels_last)
