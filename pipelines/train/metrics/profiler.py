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
    """Traces the steps that the job asks for on this rank, if it does."""

    def __init__(self, job: TrainJob, rank: int) -> None:
        self._store, self._rank, wanted = job.store, rank, job.profile
        is_traced = wanted and (rank == 0 or wanted.all_ranks)
        self._steps = range(wanted.first, wanted.end) if wanted and is_traced else range(0)
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Step number `step` begins."""
        if self._profiler is not None or step not in self._steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first = step
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def after(self, step: int) -> None:
        """Steps up to, without, `step` are done."""
        if step >= self._steps.stop:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything: its last step is done, or there are no further steps."""
        if self._profiler is None:
            return
        self._profiler.stop()
        name = f"{PROFILE}/steps-{self._first}-{self._steps.stop}-rank-{self._rank}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            with self._store.writing(name) as file:
                file.write(path.read_bytes())
        log.info("profile of steps %d to %d: %s", self._first, self._steps.stop - 1, self._store.path(name))
        self._profiler, self._steps = None, range(0)
