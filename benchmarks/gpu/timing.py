"""Seconds of a call by the device's own clock, and its peak of memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 7, warm_up: int = 2) -> float:
    """Median seconds of a call after some that warm up, by the device's own clock."""
    for _ in range(warm_up):
        call()
    return sorted(_once(call, device) for _ in range(rounds))[rounds // 2]


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
