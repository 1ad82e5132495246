"""What the CUDA kernels are given: the tensors themselves wherever FlashAttention can take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import flash_kernels as kernels
from model.attention.flash_kernels import attend, attend_backward_
from model.attention.plan.runs import Run

WHOLE = [Run(0, 48, 0, 48, True)]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every kernel call."""
    seen: list[Tensor] = []

    def forward(*inputs: Any, scale: float) -> tuple[Tensor, Tensor]:
        q = inputs[0]
        seen.extend(inputs[:3])
        return torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))

    def backward(*inputs: Any, scale: float) -> list[Tensor]:
        seen.extend(inputs[:5])
        return [torch.zeros_like(x) for x in inputs[1:4]]

    monkeypatch.setattr(kernels, "_cuda_forward", forward)
    monkeypatch.setattr(kernels, "_cuda_backward", backward)
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    return seen


def tensors(size: int) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = torch.randn(48, 4, size), torch.randn(48, 2, 2, size)
    return (q, *kv.unbind(1))


def test_a_head_size_that_fits_is_not_copied(given: list[Tensor]) -> None:
    q, k, v = tensors(24)
    out, lse = attend(q, k, v, WHOLE)
    grad, rounded = torch.randn_like(q), out.to(q.dtype)
    attend_backward_(*(torch.zeros_like(x) for x in (q, k, v)), grad, q, k, v, rounded, lse, WHOLE)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in (q, k, v, grad, q, k, v, rounded)]


def test_a_head_size_that_does_not_fit_is_padded_and_no_dimension_of_a_head_has_gaps(given: list[Tensor]) -> None:
    attend(*tensors(20), WHOLE)
    attend(*(x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in tensors(24)), WHOLE)
    assert {x.shape[-1] for x in given} == {24}
    assert {x.stride(-1) for x in given} == {1}
