"""The reference itself: its formulas against autograd's gradient of a softmax over the whole masked matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention.plan.runs import Run
from testing import dense_attention as reference
from testing.dense_attention import allowed_pairs, dense_attention, dense_results, random_tensors, relative_error

CU_SEQLENS = np.array([0, 1, 30, 31, 48])


def by_autograd(tensors: list[Tensor], allowed: Tensor, scale: float) -> list[Tensor]:
    q, k, v, grad = (x.double().requires_grad_() for x in tensors)
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(repeat, 1))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]


@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_out_and_gradients_are_those_of_a_masked_softmax(
    rows: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS", rows)
    tensors = random_tensors(48, 4, 2, 24, torch.float64)
    exact = by_autograd(tensors, torch.from_numpy(allowed_pairs(CU_SEQLENS)), scale or 24**-0.5)
    for x, y in zip(dense_results(tensors, CU_SEQLENS, scale), exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_a_query_without_a_key_gives_nothing_and_an_empty_sum() -> None:
    tensors = random_tensors(8, 2, 2, 8, torch.float64)
    out, lse, dq, dk, dv = dense_attention(tensors, [Run(0, 4, 2, 6, True), Run(2, 4, 0, 1, False)])
    assert (lse[4:] == -torch.inf).all()
    assert lse[:4].isfinite().all()
    assert not any(x.isnan().any() for x in (out, dq, dk, dv))
    assert not any(x[4:].any() for x in (out, dq))
    assert not any(x[[1, 6, 7]].any() for x in (dk, dv))


def test_an_error_beside_nothing_is_measured_by_what_a_tensor_counts_as_at_least() -> None:
    assert relative_error(torch.full((100,), 0.01), torch.zeros(100), least=0.1) == pytest.approx(0.1)
    assert relative_error(torch.full((100,), 2.0), torch.ones(100), least=0.1) == pytest.approx(1.0)
    assert np.isnan(relative_error(torch.tensor([1.0, np.nan]), torch.ones(2), least=0.1))
