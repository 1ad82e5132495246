"""Whether Weights & Biases can be used as a recipe asks, known before anything has run."""

from __future__ import annotations

import importlib.util

from pipelines.recipe import Recipe
from storage.errors import UserError


def check_wandb(recipe: Recipe) -> None:
    """Raise UserError where the recipe asks for it and the package, or the key for its server, is missing here."""
    wanted = recipe.train.wandb
    if wanted is None or wanted.mode == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.wandb: the package wandb is not installed; pip install 'ringworld[wandb]' here and on the workers, "
            "or drop the key"
        )
    if wanted.mode == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "train.wandb: there is no API key; run `wandb login`, set WANDB_API_KEY, or set train.wandb.mode to "
                "offline"
            )
