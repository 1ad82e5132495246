"""The part "rope" fails where angles or tables are rounded, positions are off by one, or a half turns the wrong way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.layers.kernels import torch_compile
from model.llama import rope
from tests.benchmarks.gpu.rehearsal import rehearse

tables = rope.rope_tables


def test_it_passes() -> None:
    rehearsal = rehearse("rope")
    assert rehearsal.passed, rehearsal.last
    assert {row["what"] for row in rehearsal.rows if row["kind"] == "skipped"} == {"liger"}
    assert any(row["what"].startswith("compile, bfloat16") for row in rehearsal.rows)


def test_angles_in_fp32_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(positions: Tensor, theta: float, head: int) -> tuple[Tensor, Tensor]:
        frequencies = theta ** -(torch.arange(0, head, 2).float() / head)
        angles = positions.float()[..., None] * frequencies
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    monkeypatch.setattr(rope, "rope_tables", rounded)
    broken = rehearse("rope").broken
    assert "cosines, theta 5e+07: error at position 1,048,575" in broken
    assert "torch, float32: q" in broken


def test_tables_in_bf16_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*arguments: object) -> tuple[Tensor, ...]:
        return tuple(x.bfloat16().float() for x in tables(*arguments))

    monkeypatch.setattr(rope, "rope_tables", rounded)
    assert {f"{name}, bfloat16: q, over rounding once" for name in ("torch", "compile")} <= rehearse("rope").broken


def test_positions_off_by_one_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "rope_tables", lambda positions, *rest: tables(positions + 1, *rest))
    assert not rehearse("rope").passed


def test_a_backward_that_turns_the_same_way_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_rotate_back", torch_compile._rotate)
    broken = rehearse("rope").broken
    assert "compile, float32: dq" in broken
    assert not any(what.startswith("torch") for what in broken)
