"""Seconds of the parts of a step, without making a GPU wait.

In: `with clock.part("forward"):` around the work. Out: `read()`, seconds by part: the wall clock's on a CPU; on a GPU,
which works behind the host, those between two events in its stream, read after the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """Adds up the seconds of each part; parts may lie within each other."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds within to the part of this name."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading. On a GPU the host must have waited for the work before."""
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
