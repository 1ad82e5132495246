"""The part "loss" fails where softmaxes, chunks or gradients are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from model.llama import loss
from tests.benchmarks.gpu.rehearsal import rehearse


def test_it_passes() -> None:
    rehearsal = rehearse("loss")
    assert rehearsal.passed, rehearsal.last


def test_a_softmax_over_the_joint_vocabulary_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = loss._chunks

    def joint(labels: Tensor, ranges: Sequence[range], chunk: int) -> Any:
        return [(rows, range(ranges[-1].stop)) for rows, _ in chunks(labels, ranges, chunk)]

    monkeypatch.setattr(loss, "_chunks", joint)
    broken = rehearse("loss").broken
    assert "float32, both modalities, chunks of 7: nats" in broken
    assert "float32, text alone: values that have to be 0 and are not" in broken


def test_a_last_chunk_that_is_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = loss._chunks
    monkeypatch.setattr(loss, "_chunks", lambda *arguments: chunks(*arguments)[:-1])
    assert not rehearse("loss").passed


def test_a_gradient_of_the_last_chunk_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "add_product_", lambda total, grad, rows: total.copy_(grad.t() @ rows))
    broken = rehearse("loss").broken
    assert "bfloat16, both modalities, chunks of 7: gradient of the head" in broken
    assert not any("gradient of hidden" in what for what in broken)
