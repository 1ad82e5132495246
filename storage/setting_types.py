"""Types of settings, for the dataclasses in which components declare theirs and for the recipe made of them.

Bounds are pydantic's, which checks recipes. A setting affects the output unless its type says otherwise:
`workers: OutputNeutral[Positive] = 1`; `pipelines.recipe.output_settings` reads the marks.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

T = TypeVar("T")


def _no_bool(value: Any) -> Any:
    """pydantic takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


_Number = BeforeValidator(_no_bool)
Positive = Annotated[int, Field(gt=0, lt=2**63), _Number]
AtLeast2 = Annotated[int, Field(ge=2, lt=2**63), _Number]
Count = Annotated[int, Field(ge=0, lt=2**63), _Number]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Finite = Annotated[T, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]

OUTPUT_NEUTRAL = "does not affect the output"
"""The mark in the metadata of an annotated type."""

OutputNeutral = Annotated[T, OUTPUT_NEUTRAL]
"""A setting that changes how fast or how safely something is made, and not what is made."""

NEUTRAL_UNTIL_SET = "does not affect the output while it is None"
"""The same of a type whose default is None."""

NeutralUntilSet = Annotated[T | None, NEUTRAL_UNTIL_SET]
"""A setting that earlier versions did not have: None, its default, makes what they made, and is known to no output."""
