"""A stage's steps in Weights & Biases: one run a stage, which goes on by its id after a restart.

wandb keeps the first figures of a step's number and drops later ones, so steps are sent with their checkpoint: a step
that the stage goes back from is never sent, and one that is done again after a kill has the same figures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from pipelines.dag.manifest import digest
from pipelines.recipe import Recipe
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import Step
from storage.errors import UserError


def check_wandb(recipe: Recipe) -> None:
    """Raise UserError where the recipe asks for wandb and the package, or the key for its server, is missing here."""
    wanted = recipe.training.wandb
    if wanted is None or wanted.mode == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        remedy = "pip install 'ringworld[wandb]' here and on the workers, or drop the key"
        raise UserError(f"train.wandb: the package wandb is not installed; {remedy}")
    if wanted.mode == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            remedy = "run `wandb login`, set WANDB_API_KEY, or set train.wandb.mode to offline"
            raise UserError(f"train.wandb: there is no API key; {remedy}")


class WeightsAndBiases:
    """A run of the recipe's project."""

    def __init__(self, job: TrainJob) -> None:
        import wandb

        wanted = job.recipe.training.wandb
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
            config=job.recipe.public_json(),
            settings=wandb.Settings(console="off"),
        )

    def publish(self, steps: Sequence[Step]) -> None:
        """Send steps that belong to a checkpoint."""
        for step in steps:  # `_timestamp` is wandb's own key
            self._run.log({**step.figures, "_timestamp": step.time}, step=step.line["step"], commit=True)

    def close(self) -> None:
        """End the run as a success."""
        self._run.finish()
