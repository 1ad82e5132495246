"""The weights of a finished vqgan stage as a `VQGAN`."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.recipe import VisualTokenizer
from storage.store import Store
from tokenization.codecs.vqgan.model import VQGAN

WEIGHTS = "weights"
"""The stage's folder of them."""


def load_vqgan(store: Store, recipe: VisualTokenizer, **compute: Any) -> VQGAN:
    """The weights that a finished stage committed."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return VQGAN.load(store.fetch_folder(WEIGHTS), recipe.sizes, dtype=dtype, **compute)
