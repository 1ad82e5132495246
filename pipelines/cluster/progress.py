"""Progress and figures: a bar in the terminal, one line of log per event, every figure a Ray metric.

The metrics reach the endpoint that Ray's dashboard and Prometheus scrape, under `ray_ringworld_<figure>{stage=...}`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.metrics import Gauge
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_ANSWER_SECONDS = 10.0


class Meter:
    """Sets figures of one stage as Ray gauges, in the driver and in any worker."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._gauges: dict[str, Gauge] = {}

    def set(self, source: str | None = None, /, **figures: float | None) -> None:
        """Set gauges by name, of the whole stage or of one of its sources; None is passed over."""
        if not ray.is_initialized():
            return
        tags = {"stage": self._stage} if source is None else {"stage": self._stage, "source": source}
        for name, value in figures.items():
            if value is None:
                continue
            if name not in self._gauges:
                metric = "ringworld_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(metric, description=name, tag_keys=tuple(tags))
            self._gauges[name].set(float(value), tags)


class Bar:
    """One stage's bar. `advance` moves it; figures given with it appear beside it and as metrics."""

    def __init__(self, stage: str, terminal: Any) -> None:
        self._bar, self._meter = terminal, Meter(stage)
        self._meter.set(progress_total=terminal.total, progress_done=0)

    def advance(self, steps: int = 1, **figures: float | None) -> None:
        """Move by so many units."""
        shown = {name: f"{value:.4g}" for name, value in figures.items() if value is not None}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)
        self._meter.set(progress_done=self._bar.n, rate=self._bar.format_dict["rate"], **figures)


@contextlib.contextmanager
def bar(stage: str, total: int | None, unit: str) -> Iterator[Bar]:
    """A bar for the length of the block; log lines pass above it."""
    look = {"dynamic_ncols": True, "mininterval": 0.5, "file": sys.stderr}
    with (
        logging_redirect_tqdm(loggers=[logging.getLogger()]),
        tqdm(total=total, desc=f"{stage:<16}", unit=unit, **look) as terminal,
    ):
        yield Bar(stage, terminal)


@contextlib.contextmanager
def following(line: Bar, watch: Any) -> Iterator[None]:
    """Move the bar by what remote work reports to `watch`, an actor `pipelines.cluster.heartbeat.Watch`.

    The actor is ended with the block. One that does not answer leaves the bar where it is.
    """
    stop = threading.Event()

    def follow() -> None:
        shown, is_last_look = 0, False
        while not is_last_look:
            is_last_look = stop.wait(0.5)
            with contextlib.suppress(RayError):
                step, figures = ray.get(watch.last.remote(), timeout=_ANSWER_SECONDS)
                if step > shown:
                    line.advance(step - shown, **figures)
                    shown = step

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ray.kill(watch)
