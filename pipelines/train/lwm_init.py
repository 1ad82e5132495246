"""A recipe's `model.init` that is a released LWM checkpoint: which file it is, and its weights as a Llama's.

The file lacks the number of heads, which `model.size` has, and the other sizes there have to be the file's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.llama.sizes import llama_sizes
from pipelines.recipe import Recipe
from storage.errors import UserError
from storage.public_url import public_url
from storage.urls import fetch_file, is_folder

if TYPE_CHECKING:  # torch, which planning does without
    from model.convert.import_lwm import LWMWeights


def lwm_file(init: str, options: dict[str, Any]) -> str | None:
    """The URL of the LWM checkpoint that `model.init` names; None where it names a folder."""
    return None if is_folder(init, options) else init


def lwm_weights(recipe: Recipe, url: str, context: int, rope_theta: float) -> LWMWeights:
    """The weights in the checkpoint, which stays where it is where it is a local file, and is fetched else.

    Raises UserError where it is none of LWM's, or of other sizes than `model.size`.
    """
    from model.convert.import_lwm import LWMWeights, lwm_config, open_lwm

    sizes = llama_sizes(recipe.model.size)
    leaves = open_lwm(fetch_file(url, recipe.storage.options))
    config = lwm_config(leaves, sizes["num_attention_heads"], context, rope_theta)
    for name, value in sizes.items():
        if (found := getattr(config, name)) != value and isinstance(value, int):
            raise UserError(
                f"model.size: {name} is {value}, in the LWM checkpoint {public_url(url)} {found}; give the sizes of "
                f"the checkpoint (LWM's large ones are 7B)"
            )
    weights = LWMWeights(leaves, config)
    weights.check()
    return weights
