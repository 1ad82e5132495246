"""The part "kernels" fails where a kernel, the merge or the backward is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.attention import flash_kernels
from model.attention.plan.runs import Run
from tests.benchmarks.gpu.rehearsal import rehearse


def test_it_passes() -> None:
    assert rehearse("kernels").passed


def test_a_merge_that_takes_the_larger_of_two_blocks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_(out: Any, lse: Any, block_out: Any, block_lse: Any) -> None:
        out.copy_(torch.where((block_lse > lse).unsqueeze(-1), block_out, out))
        lse.copy_(torch.maximum(lse, block_lse))

    monkeypatch.setattr(flash_kernels, "merge_", merge_)
    assert "documents in four blocks of keys, float32: out, dq, dk, dv" in rehearse("kernels").broken


def test_a_causal_run_without_its_diagonal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = flash_kernels._cpu_forward

    def shifted(q: Any, k: Any, v: Any, dropout: float, causal: bool, scale: Any = None) -> Any:
        return forward(q, k.roll(1, 2), v.roll(1, 2), dropout, causal, scale=scale)

    monkeypatch.setattr(flash_kernels, "_cpu_forward", shifted)
    assert not rehearse("kernels").passed


def test_a_backward_that_misses_the_last_query_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = flash_kernels._backward_cpu

    def cut(inputs: Any, lse: Any, run: Run, scale: Any) -> Any:
        dq, dk, dv = backward(inputs, lse, run, scale)
        return dq.index_fill(0, torch.tensor([len(dq) - 1]), 0.0), dk, dv

    monkeypatch.setattr(flash_kernels, "_backward_cpu", cut)
    assert not rehearse("kernels").passed
