"""A torch profiler's trace of some steps of a train stage, for chrome://tracing or https://ui.perfetto.dev.

In: the steps asked for. Out: `profile/steps-A-B-rank-R.json` in the stage's folder, Chrome's trace format. It is no
part of what a stage makes, so asking for one changes no fingerprint.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipelines.train.job import PROFILE, TrainJob

log = logging.getLogger("ringworld")


class Profile:
    """Traces the steps from `before(first)` to `after(last)`; does nothing on a rank that is not asked to."""

    def __init__(self, job: TrainJob, rank: int) -> None:
        self._store, self._rank = job.store, rank
        asked = job.profile
        self._asked = asked if asked is not None and (rank == 0 or asked.all_ranks) else None
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Step number `step` begins."""
        asked = self._asked
        if asked is None or self._profiler is not None or not asked.first <= step < asked.end:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first = step
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def after(self, step: int) -> None:
        """Steps up to, without, `step` are done."""
        if self._profiler is not None and self._asked is not None and step >= self._asked.end:
            self._write(step)

    def close(self) -> None:
        """There are no further steps: write what was traced of those asked for."""
        if self._profiler is not None and self._asked is not None:
            self._write(self._asked.end)

    def _write(self, end: int) -> None:
        self._profiler.stop()
        name = f"{PROFILE}/steps-{self._first}-{end}-rank-{self._rank}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            with self._store.writing(name) as file:
                file.write(path.read_bytes())
        log.info("profile of steps %d to %d: %s", self._first, end - 1, self._store.path(name))
        self._profiler = self._asked = None
