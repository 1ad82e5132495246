"""The recipe: one typed tree that says what to run, validated once, at the edge."""

from pipelines.recipe.base import EncoderResources, Resources, output_settings
from pipelines.recipe.data import Kind, Pack, PackedData, Source, Tokenize, VisualTokenizer
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.train import BadSteps, Train, TrainStage

__all__ = [
    "BadSteps",
    "EncoderResources",
    "Kind",
    "Pack",
    "PackedData",
    "Recipe",
    "Resources",
    "Source",
    "Tokenize",
    "Train",
    "TrainStage",
    "VisualTokenizer",
    "output_settings",
]
