"""Why a call is slow: its largest kernels by name and share, and the floor by what limits it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import explain
from benchmarks.gpu.explain import copy_bandwidth, explained, floor, matrix_peak, profile_top

CPU = torch.device("cpu")


def test_a_profile_names_the_largest_kernels_first() -> None:
    a = torch.randn(1024, 1024)
    top = profile_top(lambda: (a @ a).relu(), CPU, 2)
    assert top[0]["kernel"] == "aten::mm"
    assert len(top) == 2
    assert top[0]["share"] >= top[1]["share"] > 0
    assert top[0]["calls"] == 1


def test_a_floor_is_the_longer_of_computing_and_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "matrix_peak", lambda device: 1e12)
    monkeypatch.setattr(explain, "copy_bandwidth", lambda device: 1e9)
    assert floor(CPU, flops=2e12, bytes=1e9) == {"floor_seconds": 2.0, "floor_by": "flops"}
    assert floor(CPU, flops=2e12, bytes=3e9) == {"floor_seconds": 3.0, "floor_by": "bytes"}


def test_what_a_device_reaches_is_measured_once() -> None:
    assert matrix_peak(CPU) == matrix_peak(CPU) > 1e8
    assert copy_bandwidth(CPU) == copy_bandwidth(CPU) > 1e7


def test_an_explanation_has_all_three() -> None:
    a = torch.randn(128, 128)
    row = explained(lambda: a @ a, CPU, flops=2 * 128**3, bytes=3 * 4 * 128**2)
    assert set(row) == {"profile", "busy_seconds", "floor_seconds", "floor_by"}
    assert row["busy_seconds"] > 0
