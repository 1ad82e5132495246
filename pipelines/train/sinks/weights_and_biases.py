"""The sink to Weights & Biases, for those who ask for it: one run a stage, carried on by its id after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.dag import digest
from pipelines.train.job import TrainJob
from pipelines.train.sinks.sink import Shown


class WeightsAndBiases(Shown):
    """A run of the recipe's project. A step that is done again after a kill is passed over by wandb, being the same."""

    def __init__(self, job: TrainJob) -> None:
        import wandb

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
        """Log the figures."""
        self._run.log(dict(figures), step=line["step"], commit=True)

    def close(self) -> None:
        """End the run as a success."""
        self._run.finish()
