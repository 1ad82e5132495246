"""Block attention on the card, forward and backward, held against fp64 by the definition.

Error is the norm of the difference over the norm of the exact tensor. Its limit is that of rounding the inputs' dtype:
bf16 has 8 bits, so a sound kernel lies near 2e-3 and a wrong row far above; what is merged over blocks is fp32, so
many blocks may not be worse than one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.part import Bench
from model.attention.flash_kernels import attend, attend_, attend_backward_, cuda_kernel
from model.attention.plan.runs import Run, Runs
from testing.dense_attention import dense_attention, random_tensors, relative_error

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
"""Largest relative error of out, dq, dk and dv, by the inputs' dtype."""
LEAST = 0.1
"""Root mean square of an exact tensor below which its error is measured by this much; a random one has about 1."""
LSE_LIMIT = 1e-3
"""Largest absolute error of a log-sum-exp, which kernels give in fp32, of scores from half precision."""
LENGTHS = (1, 2, 7, 63, 64, 65, 127, 129, 1000, 1024, 4097, 16384)
HEAD_SIZES = (64, 96, 128, 256, 20)
"""20 is no multiple of 8: it is padded."""
GROUPS = ((8, 8), (8, 2), (8, 1))
"""Heads of queries and of keys."""


def run(bench: Bench) -> None:
    """Every row is one shape; the worst of out, dq, dk, dv is checked."""
    if bench.on_cuda and cuda_kernel() != "FA3":
        bench.skip("FlashAttention-3", "its package is not installed, or the GPU is no Hopper")
    dtypes = (torch.bfloat16, torch.float16) if bench.on_cuda else (torch.float32,)
    lengths = bench.size(LENGTHS, (1, 7, 65))
    for length in lengths:
        _check(bench, f"one document of {length}", _document(length), length, dtypes[0])
    for size in bench.size(HEAD_SIZES, (16, 20)):
        for heads, kv_heads in bench.size(GROUPS, ((4, 2),)):
            what = f"head size {size}, {heads} heads over {kv_heads}"
            _check(bench, what, *_packed(bench.size(1024, 96)), dtypes[-1], heads, kv_heads, size)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        packed = _packed(bench.size(4096, 128))
        _check(bench, f"documents in four blocks of keys, {name}", *packed, dtype)
        _check(bench, f"strided inputs, {name}", *packed, dtype, strided=True)
        with deterministic():
            _check(bench, f"deterministic, {name}", *packed, dtype)
    with deterministic():
        _repeats(bench, *_packed(bench.size(4096, 128)), dtypes[0])


def _document(length: int) -> list[tuple[slice, list[Run]]]:
    return [(slice(0, length), [Run(0, length, 0, length, True)])]


def _packed(length: int) -> tuple[list[tuple[slice, list[Run]]], int]:
    """Four documents whose keys come in four blocks, one of them without a run: blocks, tokens."""
    ends = [0, length // 2, length // 2 + 1, 3 * length // 4, length]
    half = ends[1] // 2
    own = [
        Run(0, half, 0, half, True),
        *(Run(a, b, a, b, True) for a, b in pairwise(ends[1:])),
        Run(half, ends[1], half, ends[1], True),
    ]
    quarter = half // 2
    older = [Run(half, ends[1], 0, quarter, False)]
    rest = [Run(half, half + quarter, quarter, half, False), Run(half + quarter, ends[1], quarter, half, False)]
    everything = slice(0, length)
    return [(everything, own), (everything, older), (everything, []), (everything, rest)], length


def _check(
    bench: Bench,
    what: str,
    blocks: list[tuple[slice, list[Run]]],
    length: int,
    dtype: torch.dtype,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    strided: bool = False,
) -> None:
    tensors = random_tensors(length, heads, kv_heads, size, dtype, device=bench.device)
    if strided:
        tensors = [_heads_outermost(x) for x in tensors]
    out, lse, *gradients = by_blocks(tensors, blocks)
    exact_out, exact_lse, *exact = dense_attention(tensors, [run for _, runs in blocks for run in runs])
    errors = (relative_error(x, y, LEAST) for x, y in zip((out, *gradients), (exact_out, *exact)))
    worst = max(errors, key=lambda x: x if x == x else torch.inf)
    bench.check(f"{what}: out, dq, dk, dv", worst, at_most=LIMITS[dtype])
    bench.check(f"{what}: lse", float((lse.double() - exact_lse).abs().max()), at_most=LSE_LIMIT)


def _repeats(bench: Bench, blocks: list[tuple[slice, list[Run]]], length: int, dtype: torch.dtype) -> None:
    tensors = random_tensors(length, 4, 2, 64, dtype, device=bench.device)
    first, *others = ([x.clone() for x in by_blocks(tensors, blocks)] for _ in range(4))
    differ = sum(not torch.equal(x, y) for other in others for x, y in zip(first, other))
    bench.check("deterministic: tensors that differ in any bit over three repetitions", differ, at_most=0)


def _heads_outermost(x: Tensor) -> Tensor:
    """The same [T, H, D] in another order of memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def by_blocks(tensors: list[Tensor], blocks: list[tuple[slice, list[Run]]]) -> list[Tensor]:
    """[out, lse, dq, dk, dv] by the kernels, a block of keys at a time; the first block meets every query."""
    q, k, v, grad = tensors
    (first, own), *others = blocks
    out, lse = attend(q, k[first], v[first], Runs(own))
    for rows, runs in others:
        attend_(out, lse, q, k[rows], v[rows], Runs(runs))
    rounded = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for rows, runs in blocks:
        attend_backward_(dq, dk[rows], dv[rows], grad, q, k[rows], v[rows], rounded, lse, Runs(runs))
    return [out, lse, dq, dk, dv]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within it kernels are those of `train.deterministic`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
