"""Progress and figures: a bar in the terminal, one line of log per event, every figure a Ray metric.

The metrics reach the endpoint that Ray's dashboard and Prometheus scrape, under `ray_ringworld_<figure>{stage=...}`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger("ringworld")


class Meter:
    """Sets figures of one stage as Ray gauges; usable in the driver and in any worker."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._gauges: dict[str, Gauge] = {}

    def set(self, **figures: float | None) -> None:
        """Set gauges by name; None is passed over."""
        self._set({"stage": self._stage}, figures)

    def set_of_source(self, source: str, **figures: float | None) -> None:
        """The same for figures that each source of the stage has, tagged by its name."""
        self._set({"stage": self._stage, "source": source}, figures)

    def _set(self, tags: dict[str, str], figures: Mapping[str, float | None]) -> None:
        if not ray.is_initialized():
            return
        for name, value in figures.items():
            if value is None:
                continue
            if name not in self._gauges:
                metric = "ringworld_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(metric, description=name, tag_keys=tuple(tags))
            self._gauges[name].set(float(value), tags)


class Bar:
    """One stage's bar. `advance` moves it; figures given with it appear beside it and as metrics."""

    def __init__(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self._bar: Any = tqdm(
            total=total,
            desc=f"{stage:<16}",
            unit=unit,
            initial=done,
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )
        self._meter = Meter(stage)
        self._meter.set(progress_total=total, progress_done=done)

    def advance(self, steps: int = 1, **figures: float | None) -> None:
        """Move by so many units."""
        shown = {name: f"{value:.4g}" for name, value in figures.items() if value is not None}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)
        self._meter.set(progress_done=self._bar.n, rate=self._bar.format_dict["rate"], **figures)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


@contextlib.contextmanager
def bar(stage: str, total: int | None, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar for the length of the block; log lines pass above it."""
    with logging_redirect_tqdm(loggers=[logging.getLogger()]):
        line = Bar(stage, total, unit, done)
        try:
            yield line
        finally:
            line.close()


@ray.remote(num_cpus=0)
class _Reports:
    """The latest step and figures of work that runs elsewhere on the cluster."""

    def __init__(self) -> None:
        self._last: tuple[int, dict[str, float]] = (0, {})

    def report(self, step: int, figures: dict[str, float]) -> None:
        self._last = (step, figures)

    def last(self) -> tuple[int, dict[str, float]]:
        return self._last


@contextlib.contextmanager
def following(line: Bar, reports: Any = None) -> Iterator[Any]:
    """Yields an actor handle; what remote work tells it by `report.remote(step, figures)` moves the bar.

    reports: an actor that has `report` and `last`, ended with the block; None makes one.
    """
    actor = _Reports.remote() if reports is None else reports  # type: ignore[attr-defined]
    stop = threading.Event()

    def follow() -> None:
        shown = 0
        while True:
            last_look = stop.wait(0.5)
            step, figures = ray.get(actor.last.remote())
            if step > shown:
                line.advance(step - shown, **figures)
                shown = step
            if last_look:
                return

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join()
        ray.kill(actor)
