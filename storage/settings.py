"""How a component says of each of its settings whether what it makes depends on it.

A setting affects the output unless its type says otherwise: `workers: OutputNeutral[int] = 1`.
`pipelines.recipe.output_settings` reads the mark.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

OUTPUT_NEUTRAL = "does not affect the output"
"""The mark in the metadata of an annotated type."""

T = TypeVar("T")
OutputNeutral = Annotated[T, OUTPUT_NEUTRAL]
"""A setting that changes how fast or how safely something is made, and not what is made."""
