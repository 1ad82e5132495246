"""Whether the kernels that a recipe asks for can be had, known before anything has run."""

from __future__ import annotations

from model.layers.kernels.interface import missing_for
from pipelines.recipe import Recipe
from storage.errors import UserError


def check_kernels(recipe: Recipe) -> None:
    """Raise UserError where what `train.kernels` needs is missing here."""
    if missing := missing_for(recipe.train.kernels):
        raise UserError(f"train.kernels {recipe.train.kernels}: {missing}, or set train.kernels: torch")
