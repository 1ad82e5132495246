"""Frames a second that the VQGAN's encoder codes on the card, against the card's matrix peak.

Operations of a frame are those that torch counts of the encoder and of the search in the codebook, held against a
reckoning by the sizes alone. Variants of the product's encoder, of which each has to give its latents: batches, other
kernels of cuDNN's, weights in bf16, a CUDA graph, a compiled encoder. The best of them is to reach SHARE of the
measured peak: three fifths of the operations are products of 128 channels at 256 px, and the norms between them move
every row of those again, which alone takes about as long. The product's own call, from frames on the host to codes on
the host, is to be NEAR the best variant: where it is not, its batch or its kernels are what to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.explain import check_share, explained, matrix_peak
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.pictures import pictures
from benchmarks.gpu.timing import seconds_of
from benchmarks.gpu.vqgans import (
    TINY,
    agreement,
    compiled,
    latents_of,
    seeded_model,
    spread_codebook,
    spread_error,
)
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan, nearest_codes, pixels_of

SHARE = 0.35
NEAR = 0.7
LIMIT = 0.06
"""Error of a variant's latents over the spread of those in fp32."""
AGREE = 0.85
"""Share of the product's codes that fp32 has too."""


@dataclass(frozen=True)
class Setup:
    """A model on the device with a codebook, frames uint8 [n, H, W, 3] on the host, and what fp32 makes of them.

    flops: of a frame.
    """

    bench: Bench
    model: Any
    config: VQGANConfig
    frames: np.ndarray
    latents: Tensor
    codes: np.ndarray
    flops: float


Encode = Callable[[Tensor], Tensor]
"""Frames uint8 [n, H, W, 3] on the device to latents [n, D, h, w]."""


def run(bench: Bench) -> None:
    """Variants in order of worth, each with its figures, then the goals."""
    config = bench.size(VQGANConfig.lwm(), TINY)
    flops = counted_flops(config)
    ratio = flops / reckoned_flops(config)
    bench.check("operations of a frame that torch counts, over those reckoned", ratio, at_most=1.01, at_least=0.99)
    setup = _setup(bench, config, flops)
    middle = bench.size(32, 2)
    speeds = [_measured(setup, "eager", batch, _eager(setup, batch)) for batch in bench.size((8, 32, 128), (2,))]
    product = _product_speed(setup)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        speeds.append(_measured(setup, "eager by cuDNN's fastest kernels", middle, _plain(setup)))
    if bench.on_cuda:
        _replayed(setup, 8)
    else:
        bench.skip("CUDA graph", "the CPU has none")
    if bench.left > bench.size(25, 1):
        twin = replace(setup, model=compiled(setup.model, bench.on_cuda))
        speeds.append(_measured(twin, "compiled", middle, _eager(twin, middle)))
    else:
        bench.skip("compiled", "its time is up")
    _goals(setup, max(speeds, key=lambda speed: speed.frames_per_second), product)
    setup.model.to(torch.bfloat16)
    _measured(setup, "eager with weights in bf16", middle, _plain(setup))


class Speed(NamedTuple):
    """A variant's, for the best to be found. call: makes the codes of `batch` frames once."""

    frames_per_second: float
    batch: int
    call: Callable[[], object]


def _setup(bench: Bench, config: VQGANConfig, flops: float) -> Setup:
    exact = VQGAN(seeded_model(config), device=bench.device, batch_size=bench.size(8, 2))
    frames = pictures(bench.size(32, 4), config.resolution, seed=3)
    spread_codebook(exact, frames)
    return Setup(bench, exact.model, config, frames, latents_of(exact, frames), exact.encode(frames), flops)


def _eager(setup: Setup, batch: int) -> Encode:
    """As the product encodes a batch."""
    vqgan = VQGAN(setup.model, device=setup.bench.device, dtype=torch.bfloat16, batch_size=batch)
    return vqgan.encode_latents


def _plain(setup: Setup) -> Encode:
    """The same without the product's choice of kernels."""
    encoder = setup.model
    dtype = encoder.quant_conv.weight.dtype

    def encode(frames: Tensor) -> Tensor:
        autocast = torch.autocast(frames.device.type, torch.bfloat16, enabled=dtype != torch.bfloat16)
        with torch.inference_mode(), autocast:
            return encoder.encode(pixels_of(frames).to(dtype)).latents

    return encode


def _measured(setup: Setup, name: str, batch: int, encode: Encode) -> Speed:
    """Frames a second of a batch that lies on the card, and whether its latents are those of fp32."""
    bench = setup.bench
    repeated = np.concatenate([setup.frames] * -(-batch // len(setup.frames)))[:batch]
    frames = torch.from_numpy(repeated).to(bench.device)
    latents, exact = encode(frames), setup.latents[:batch]
    what = f"{name}, {batch} frames"
    error = spread_error(latents[: len(exact)].float(), exact)
    bench.check(f"{what}: error of latents over fp32's spread", error, at_most=LIMIT)
    codebook = setup.model.quantize.embedding.weight

    def call() -> Tensor:
        return nearest_codes(encode(frames), codebook)

    return _said(setup, what, batch, call)


def _said(setup: Setup, what: str, batch: int, call: Callable[[], object]) -> Speed:
    speed = batch / seconds_of(call, setup.bench.device, rounds=setup.bench.size(5, 3))
    share = speed * setup.flops / matrix_peak(setup.bench.device)
    check_share(setup.bench, what, share)
    setup.bench.figures(what, frames_per_second=round(speed, 1), share_of_peak=round(share, 4))
    return Speed(speed, batch, call)


def _replayed(setup: Setup, batch: int) -> None:
    """The eager encoder and the search as a CUDA graph: what the host costs is the difference."""
    frames = torch.from_numpy(setup.frames[:batch]).to(setup.bench.device)
    encode, codebook = _eager(setup, batch), setup.model.quantize.embedding.weight
    codes = nearest_codes(encode(frames), codebook)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their handles for it before anything is captured
        nearest_codes(encode(frames), codebook)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        replayed = nearest_codes(encode(frames), codebook)
    graph.replay()
    setup.bench.check("CUDA graph: codes that eager has not", int((replayed != codes).sum()), at_most=0)
    _said(setup, f"CUDA graph, {batch} frames", batch, graph.replay)


def _product(setup: Setup) -> VQGAN:
    return VQGAN(setup.model, device=setup.bench.device, dtype=torch.bfloat16)


def _product_speed(setup: Setup) -> float:
    """Frames a second of `VQGAN.encode` with its default batch, frames and codes on the host, by the host's clock."""
    vqgan = _product(setup)
    codes = vqgan.encode(setup.frames)
    share = agreement(codes, setup.codes)
    setup.bench.check("the product's call: share of codes that fp32 has too", share, at_least=AGREE)
    what = f"the product's call, {vqgan.batch_size} frames a batch"
    return _said(setup, what, len(setup.frames), lambda: vqgan.encode(setup.frames)).frames_per_second


def _goals(setup: Setup, best: Speed, product: float) -> None:
    """product: frames a second of the product's call."""
    bench, of_frame = setup.bench, (setup.flops, moved_bytes(setup.config))
    some, vqgan = setup.frames[:8], _product(setup)

    def explain(call: Callable[[], object], frames: int) -> Callable[[], Row]:
        return lambda: explained(call, bench.device, *(frames * needed for needed in of_frame))

    share = best.frames_per_second * setup.flops / matrix_peak(bench.device)
    why = explain(best.call, best.batch)
    bench.goal("best variant: share of the matrix peak", share, at_least=SHARE, explain=why)
    near, why = product / best.frames_per_second, explain(lambda: vqgan.encode(some), len(some))
    bench.goal("the product's call over the best variant", near, at_least=NEAR, explain=why)


# --- Operations and bytes of a frame ---


def counted_flops(config: VQGANConfig) -> float:
    """What torch counts of the encoder and the search, of one frame; nothing is computed."""
    with torch.device("meta"):
        model = build_vqgan(config)
        frame = torch.zeros(1, config.resolution, config.resolution, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        nearest_codes(model.encode(pixels_of(frame)).latents, model.quantize.embedding.weight)
    return float(counter.get_total_flops())


class Convolution(NamedTuple):
    """Channels in and out, side of the kernel, side of the picture before and after."""

    inward: int
    outward: int
    kernel: int
    before: int
    after: int


def convolutions(config: VQGANConfig) -> list[Convolution]:
    """Of the encoder, in its order (LWM's VQGAN: `tokenization.codecs.vqgan.config`)."""
    side, width = config.resolution, config.channels[0]
    found = [Convolution(3, width, 3, side, side)]

    def block(inward: int, outward: int) -> None:
        found.extend((Convolution(inward, outward, 3, side, side), Convolution(outward, outward, 3, side, side)))
        if inward != outward:
            found.append(Convolution(inward, outward, 1, side, side))

    for level, channels in enumerate(config.channels):
        for number in range(config.res_blocks):
            block(channels if number else width, channels)
        width = channels
        if level < len(config.channels) - 1:
            found.append(Convolution(width, width, 3, side, side // 2))
            side //= 2
    block(width, width)
    block(width, width)
    last = Convolution(config.latent_channels, config.embed_dim, 1, side, side)
    return [*found, Convolution(width, config.latent_channels, 3, side, side), last]


def reckoned_flops(config: VQGANConfig) -> float:
    """Of one frame: two a weight and place of each convolution, and the search's product with every entry."""
    of_all = sum(2 * c.inward * c.outward * c.kernel**2 * c.after**2 for c in convolutions(config))
    return float(of_all + 2 * config.codes_per_frame * config.codebook_size * config.embed_dim)


def moved_bytes(config: VQGANConfig) -> float:
    """Of one frame at least: each convolution reads its rows and writes its result in bf16, all else being fused."""
    return float(sum(2 * (c.inward * c.before**2 + c.outward * c.after**2) for c in convolutions(config)))
