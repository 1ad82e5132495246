"""What every worker of a train stage needs to know, and the folders that a stage makes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from pipelines.pack.record import PackRecord
from pipelines.recipe import Recipe, TrainStage
from pipelines.train.profiled_steps import ProfiledSteps
from storage.store import Store
from tokenization.vocabulary import JointVocabulary

MODEL = "model"
CHECKPOINTS = "checkpoints"
METRICS = "metrics"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
_COLLECTIVE_SECONDS = 1800


@dataclass(frozen=True)
class TrainJob:
    """What every worker needs to know.

    shards, packed: of the pack stage, the folder of its shards and its record. before: the folder of the train stage
    before. skip: names of bad shards, which all workers skip. profile: steps to trace.
    """

    recipe: Recipe
    stage: TrainStage
    vocabulary: JointVocabulary
    shards: Store
    packed: PackRecord
    before: Store | None
    store: Store
    skip: tuple[str, ...] = ()
    profile: ProfiledSteps | None = None

    @property
    def collective_timeout(self) -> timedelta:
        """After which torch ends a worker whose collective does not: later than `train.hang_seconds` does, which names
        the worker that the others wait for.
        """
        return timedelta(seconds=max(_COLLECTIVE_SECONDS, 2 * self.recipe.training.hang_seconds))
