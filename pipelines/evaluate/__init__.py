"""The evaluate stage: what the trained models are worth on what they have not seen."""

from pipelines.evaluate.stage import evaluate_all

__all__ = ["evaluate_all"]
