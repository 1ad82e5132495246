"""Rotary positions on the card, up to the last of a million tokens, against Python's doubles and a rotation in fp64.

The tables have to be exact to fp32 at every position, a rotation in fp32 to a rounding or two, and one in bf16 as near
as its exact result rounded once: tables in bf16, or a rounding between, would show as a multiple of that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.part import Bench
from model.layers.fused_layers import load_kernels
from model.layers.kernels.interface import Kernels, missing_for
from model.llama.config import llama_config
from model.llama.rope import ExactRotaryEmbedding, Rotate, rotate_by_torch
from testing.dense_attention import relative_error

LAST = 1_048_575
"""The last position of a million tokens."""
POSITIONS = (0, 1, 2, 1000, 32_767, 65_535, 2**19 - 1, 2**19, 1_000_003, LAST - 1, LAST)
THETAS = (1e4, 5e7)
TABLE_LIMIT = 1e-7
"""Largest absolute error of a cosine or sine: fp32's rounding is 6e-8 at 1."""
ROTATION_LIMIT = 2e-7
"""Largest relative error of a rotation in fp32."""
ROUNDED_ONCE = 1.05
"""Largest error of a rotation in bf16 over that of rounding its exact result."""
ROUNDED_TERMS = 1.6
"""The same of torch's own gradients: autograd rounds both terms, then their sum, which makes sqrt(2) of it."""
OTHERS: tuple[Kernels, ...] = ("compile", "liger")


def run(bench: Bench) -> None:
    """Tables first, then rotations: torch's, the compiled one, Liger's."""
    head, heads, kv_heads = bench.size((128, 32, 8), (16, 4, 2))
    for theta in THETAS:
        _tables(bench, theta, head)
    tokens = bench.size(4096, 24)
    positions = torch.arange(LAST + 1 - tokens, LAST + 1, device=bench.device)[None]
    for name, rotate in _rotations(bench):
        for dtype in (torch.float32, torch.bfloat16):
            _rotation(bench, name, rotate, positions, (heads, kv_heads, head), dtype)


def _tables(bench: Bench, theta: float, head: int) -> None:
    cos, sin = (x[0] for x in _product_tables(torch.tensor([POSITIONS], device=bench.device), theta, head))
    angles = [[position * theta ** (-2 * i / head) for i in range(head // 2)] for position in POSITIONS]
    for name, table, function in (("cosines", cos, math.cos), ("sines", sin, math.sin)):
        exact = torch.tensor([2 * [function(angle) for angle in row] for row in angles], dtype=torch.float64)
        error = (table.cpu().double() - exact).abs().amax(1)
        what = f"{name}, theta {theta:g}"
        bench.check(f"{what}: largest error at any position", float(error.max()), at_most=TABLE_LIMIT)
        bench.check(f"{what}: error at position {LAST:,}", float(error[-1]), at_most=TABLE_LIMIT)


def _product_tables(positions: Tensor, theta: float, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, T, head] as a model in bf16 gets them at positions [1, T]."""
    sizes = {"hidden_size": head, "intermediate_size": head, "num_hidden_layers": 1, "num_attention_heads": 1}
    embedding = ExactRotaryEmbedding(llama_config(sizes, 64, LAST + 1, theta)).to(positions.device, torch.bfloat16)
    return embedding(torch.empty(0, device=positions.device), positions)


def _rotations(bench: Bench) -> Iterator[tuple[str, Rotate]]:
    """torch's rotation, and the fused ones that this machine can run."""
    yield "torch", rotate_by_torch
    for name in OTHERS:
        why = missing_for(name)
        if name == "liger" and not bench.on_cuda:
            why = "Triton's kernels need a GPU"
        if why is not None:
            bench.skip(name, why)
            continue
        # A rehearsal runs the same arithmetic and compiles nothing, which would take longer than all else.
        with torch.compiler.set_stance("force_eager") if bench.tiny else contextlib.nullcontext():
            yield name, load_kernels(name).rotate


def _rotation(
    bench: Bench,
    name: str,
    rotate: Rotate,
    positions: Tensor,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Forward, and the backward, which turns gradients by the opposite angles."""
    heads, kv_heads, head = sizes
    generator = torch.Generator(bench.device).manual_seed(0)
    shapes = [(*positions.shape, n, head) for n in (heads, kv_heads, heads, kv_heads)]
    drawn = [torch.randn(shape, generator=generator, device=bench.device).to(dtype) for shape in shapes]
    exact = [*_turned(drawn[:2], positions, 1.0), *_turned(drawn[2:], positions, -1.0)]
    q, k = (x.clone().requires_grad_() for x in drawn[:2])
    # Kernels may write over what they are given, their gradients too.
    turned = rotate(q * 1, k * 1, *_product_tables(positions, THETAS[-1], head))
    gradients = torch.autograd.grad(turned, (q, k), [x.clone() for x in drawn[2:]])
    for part, x, true in zip(("q", "k", "dq", "dk"), (*turned, *gradients), exact):
        what = f"{name}, {str(dtype).removeprefix('torch.')}: {part}"
        error = relative_error(x, true)
        if dtype == torch.float32:
            bench.check(what, error, at_most=ROTATION_LIMIT)
        else:
            limit = ROUNDED_TERMS if name == "torch" and part.startswith("d") else ROUNDED_ONCE
            bench.check(f"{what}, over rounding once", error / relative_error(true.to(dtype), true), at_most=limit)


def _turned(tensors: list[Tensor], positions: Tensor, sign: float) -> list[Tensor]:
    """[1, T, H, D] turned in halves (arXiv 2104.09864) in fp64, by the positions' angles times `sign`."""
    head = tensors[0].shape[-1]
    frequencies = [THETAS[-1] ** (-2 * i / head) for i in range(head // 2)]
    turns = torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    angles = sign * positions.double()[..., None, None] * turns
    halves = [x.double().chunk(2, -1) for x in tensors]
    cos, sin = angles.cos(), angles.sin()
    return [torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in halves]
