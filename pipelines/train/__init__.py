"""The train stage: packed shards and the weights of the stage before to the next model."""

from pipelines.train.metrics.steps import read_metrics
from pipelines.train.stage import train_stage

__all__ = ["read_metrics", "train_stage"]
