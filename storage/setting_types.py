"""Types of settings, for the dataclasses in which components declare theirs and for the recipe made of them.

Bounds are pydantic's, which checks recipes. A setting affects the output unless its type says otherwise:
`workers: OutputNeutral[Positive] = 1`; `pipelines.recipe.output_settings` reads the mark.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Field

T = TypeVar("T")

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Finite = Annotated[T, Field(allow_inf_nan=False)]

OUTPUT_NEUTRAL = "does not affect the output"
"""The mark in the metadata of an annotated type."""

OutputNeutral = Annotated[T, OUTPUT_NEUTRAL]
"""A setting that changes how fast or how safely something is made, and not what is made."""
