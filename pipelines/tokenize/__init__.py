"""The tokenize stage: raw objects to documents in the joint vocabulary."""

from pipelines.tokenize.partition import cut_partitions
from pipelines.tokenize.stage import tokenize_all

__all__ = ["cut_partitions", "tokenize_all"]
