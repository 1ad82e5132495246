"""Runs parts in order of worth, each under its own limit, in a process that a fault of the card cannot take along.

In: the parts, a device, minutes. Out: a report that is complete after every row, so that a machine that is taken away
leaves what was measured. A part that fails, dies or outlasts its limit costs itself: the next begins in a new process.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.part import Bench, Part, Row

GRACE = 15.0
"""Seconds beyond its limit after which a part that does not look at its time is ended."""
RESERVE = 10.0
"""Seconds of the whole time that no part is given."""
REHEARSED = 2
"""Cards for which processes stand in where there is none."""
LEAST = 5.0
"""Seconds under which no further part is begun."""


def run_parts(
    parts: Sequence[Part], device: str, tiny: bool, minutes: float, each: Callable[[str, Row], object]
) -> None:
    """Run all parts, telling `each` (part's name, row) as it goes.

    Beside the rows of `Bench` a part says {"kind": "started"} first and last one of "passed", "failed" (with `why`),
    "skipped" (with `why`) or "out of time", each with the `seconds` it took.
    """
    end = time.monotonic() + 60 * minutes - RESERVE
    worker: _Worker | None = None
    for part in parts:
        cards = torch.cuda.device_count() if device == "cuda" else REHEARSED
        left = end - time.monotonic()
        if why := part.missing(cards):
            each(part.name, {"kind": "skipped", "why": why})
            continue
        if left < LEAST:
            each(part.name, {"kind": "out of time", "why": "no time was left for it", "seconds": 0.0})
            continue
        worker = worker or _Worker(device, tiny)
        if not worker.run(part, min(part.seconds, left), end, each):
            worker.end()
            worker = None
    if worker is not None:
        worker.end()


class _Worker:
    """A process that runs one part after another."""

    def __init__(self, device: str, tiny: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, device, tiny), daemon=False)
        self._process.start()
        theirs.close()

    def run(self, part: Part, seconds: float, end: float, each: Callable[[str, Row], object]) -> bool:
        """Run a part; whether the process can go on to another."""
        started = time.monotonic()
        each(part.name, {"kind": "started"})
        self._pipe.send((part, seconds))
        deadline = min(started + seconds + GRACE, end + RESERVE / 2)
        for row in self._rows(deadline):
            last = row["kind"] in ("passed", "failed")
            each(part.name, {**row, "seconds": round(time.monotonic() - started, 1)} if last else row)
            if last:
                return row["kind"] == "passed"
        died = not self._process.is_alive()
        why = f"its process died with {self._process.exitcode}" if died else f"not done {GRACE:.0f} s after its limit"
        row = {"kind": "failed" if died else "out of time", "why": why}
        each(part.name, {**row, "seconds": round(time.monotonic() - started, 1)})
        return False

    def _rows(self, deadline: float) -> Iterator[Row]:
        """What the process says until the deadline, or until it dies."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                yield self._pipe.recv()
        self._process.join(1)

    def end(self) -> None:
        """End the process, however busy."""
        self._pipe.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, device: str, tiny: bool) -> None:
    # Read when cuBLAS is first used; without it torch refuses deterministic products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            part, seconds = pipe.recv()
            bench = Bench(part, where, tiny, time.monotonic() + seconds, pipe.send)
            pipe.send(run_here(bench))


def run_here(bench: Bench) -> dict[str, Any]:
    """Run a part in this process: its last row, "passed" or "failed" with the reason."""
    try:
        bench.part.function()(bench)
    except Exception as error:
        return {"kind": "failed", "why": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        gc.collect()
        if bench.on_cuda:
            with contextlib.suppress(RuntimeError):  # of a card that a part has left in error
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    return {"kind": "failed", "why": "; ".join(bench.failures)} if bench.failures else {"kind": "passed"}
