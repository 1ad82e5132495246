"""The sink to Weights & Biases, for those who ask for it: one run a stage, carried on by its id after a restart.

wandb keeps the first it hears of a step's number and drops what comes later, so steps are sent with their checkpoint: a
step that the stage goes back from is never sent, and one that is done again after a kill is the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pipelines.dag.manifest import digest
from pipelines.train.job import TrainJob
from pipelines.train.metrics.sink import Held


class WeightsAndBiases(Held):
    """A run of the recipe's project."""

    def __init__(self, job: TrainJob) -> None:
        import wandb

        super().__init__()
        wanted = job.recipe.train.wandb
        assert wanted is not None
        name = f"train-{job.stage.name}"
        self._run = wandb.init(
            project=wanted.project,
            entity=wanted.entity,
            mode=wanted.mode,
            dir=wanted.folder,
            id=digest(job.store.url)[:16],
            resume="allow",
            name=f"{job.recipe.name} {name}",
            group=job.recipe.name,
            job_type=name,
            config=job.recipe.model_dump(mode="json", exclude={"storage": {"options"}}),
            settings=wandb.Settings(console="off"),
        )

    def step(self, line: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Keep the figures for the next checkpoint."""
        self._pending.append((line["step"], {**figures, "_timestamp": time.time()}))  # wandb's own key of when it was

    def _publish(self, taken: list[Any], checkpoint_seconds: float) -> None:
        taken[-1][1]["checkpoint_seconds"] = checkpoint_seconds
        for step, figures in taken:
            self._run.log(figures, step=step, commit=True)

    def close(self) -> None:
        """End the run as a success."""
        self._run.finish()
