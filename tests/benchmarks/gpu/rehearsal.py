"""A part of the GPU script in this process, at its smallest on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.part import Bench
from benchmarks.gpu.parts import chosen
from benchmarks.gpu.run import run_here


@dataclass(frozen=True)
class Rehearsal:
    """How a part ended, and the rows that it gave."""

    last: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def passed(self) -> bool:
        return self.last["kind"] == "passed"

    @property
    def broken(self) -> set[str]:
        """What is checked and does not hold."""
        return {row["what"] for row in self.of("check") if not row["holds"]}

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


def rehearse(name: str, seconds: float = 60.0) -> Rehearsal:
    (part,) = chosen([name])
    rows: list[dict[str, Any]] = []
    last = run_here(Bench(part, torch.device("cpu"), True, time.monotonic() + seconds, rows.append))
    return Rehearsal(last, rows)
