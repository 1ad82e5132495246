"""The part of a branch's settings by which its output is known: all but those that only say how it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel

from pipelines.recipe.base import field_types
from storage.setting_types import OUTPUT_NEUTRAL


def output_settings(settings: Any) -> Any:
    """A branch of the recipe, a `Config` or a dataclass, as plain JSON: those fields alone that affect the output, at
    every depth. Two branches for which it is equal make the same.
    """
    if isinstance(settings, dict):
        return {key: output_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [output_settings(value) for value in settings]
    if not isinstance(settings, BaseModel) and not dataclasses.is_dataclass(settings):
        return settings
    types = field_types(type(settings))
    neutral = {name for name in types if OUTPUT_NEUTRAL in getattr(types[name], "__metadata__", ())}
    return {name: output_settings(getattr(settings, name)) for name in types if name not in neutral}
