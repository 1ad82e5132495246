"""What every worker of a train stage needs to know, and the folders that a stage makes."""

from __future__ import annotations

from dataclasses import dataclass

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
