"""The chunked loss over both softmaxes on the card, forward and backward, against the dense one in fp64.

A part of a batch has no label, and some batches no target of a modality: those get exactly 0. In bf16 the limit is that
of rounding logits to 8 bits, in fp32 that of sums over the width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.part import Bench
from model.llama.loss import CHUNK, token_nll
from testing.dense_attention import relative_error
from testing.dense_loss import dense_nll

LIMITS = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Largest relative error of the nats and of both gradients."""
UNLABELLED = 0.2
"""Share of tokens without a label."""


class _Case(NamedTuple):
    """hidden [T, D], the head [V, D], the gradient of the nats [T] and the ids of both modalities."""

    hidden: Tensor
    weight: Tensor
    grad: Tensor
    ranges: Sequence[range]


def run(bench: Bench) -> None:
    """Both dtypes; targets of both modalities in chunks of several sizes, then of one, then none."""
    tokens, width, text, vision = bench.size((4096, 4096, 32000, 8448), (96, 32, 80, 40))
    ranges = (range(text), range(text, text + vision))
    for dtype in (torch.bfloat16, torch.float32):
        case = _case(bench.device, tokens, width, ranges, dtype)
        both = _labels(bench.device, tokens, range(text + vision))
        for chunk in bench.size((CHUNK, 1000, 77, 10**6), (CHUNK, 7, 1)):
            _check(bench, f"both modalities, chunks of {chunk}", case, both, chunk)
        for name, ids in zip(("text", "vision"), ranges):
            _check(bench, f"{name} alone", case, _labels(bench.device, tokens, ids), bench.size(CHUNK, 7))
        _check(bench, "no label", case, torch.full_like(both, -1), CHUNK)
    _autocast(bench, _case(bench.device, tokens, width, ranges, torch.float32), both)


def _case(device: torch.device, tokens: int, width: int, ranges: Sequence[range], dtype: torch.dtype) -> _Case:
    """Logits of unit variance, and gradients of several sizes."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = drawn(tokens, width), drawn(ranges[-1].stop, width) * width**-0.5
    return _Case(hidden.to(dtype), weight.to(dtype), drawn(tokens), ranges)


def _labels(device: torch.device, tokens: int, ids: range) -> Tensor:
    """Labels int64 [T] from `ids`, and -1."""
    generator = torch.Generator(device).manual_seed(ids.start + 1)
    labels = torch.randint(ids.start, ids.stop, (tokens,), generator=generator, device=device)
    return labels.masked_fill_(torch.rand(tokens, generator=generator, device=device) < UNLABELLED, -1)


def _check(bench: Bench, what: str, case: _Case, labels: Tensor, chunk: int) -> None:
    what = f"{str(case.weight.dtype).removeprefix('torch.')}, {what}"
    hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
    nll = token_nll(hidden, weight, labels, case.ranges, chunk)
    ours = nll.detach(), *torch.autograd.grad(nll, (hidden, weight), case.grad)
    if (labels >= 0).any():
        exact = dense_nll(hidden, weight, labels, case.ranges)
        theirs = exact.detach(), *torch.autograd.grad(exact, (hidden, weight), case.grad.double())
        for name, mine, other in zip(("nats", "gradient of hidden", "gradient of the head"), ours, theirs):
            bench.check(f"{what}: {name}", relative_error(mine, other), at_most=LIMITS[case.weight.dtype])
    bench.check(f"{what}: values that have to be 0 and are not", _misplaced(ours, labels, case.ranges), at_most=0)


def _misplaced(results: Sequence[Tensor], labels: Tensor, ranges: Sequence[range]) -> int:
    """Nats and gradients of tokens without a label, and gradients of a modality's ids without a target, but 0."""
    nll, grad_hidden, grad_weight = results
    absent = [ids for ids in ranges if not ((labels >= ids.start) & (labels < ids.stop)).any()]
    zeros = [nll[labels < 0], grad_hidden[labels < 0], *(grad_weight[ids.start : ids.stop] for ids in absent)]
    return sum(int(x.count_nonzero()) for x in zeros)


def _autocast(bench: Bench, case: _Case, labels: Tensor) -> None:
    """Under autocast fp32 tensors give to the bit what they give rounded to bf16."""
    with torch.autocast(bench.device.type, dtype=torch.bfloat16):
        nll = token_nll(case.hidden, case.weight, labels, case.ranges)
    rounded = token_nll(case.hidden.bfloat16(), case.weight.bfloat16(), labels, case.ranges)
    bench.check("autocast to bf16: nats that differ from those in bf16", int((nll != rounded).sum()), at_most=0)
