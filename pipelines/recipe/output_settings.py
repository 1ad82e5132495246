"""The part of a branch's settings by which its output is known: all but those that only say how it is made."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from pydantic import BaseModel

from storage.settings import OUTPUT_NEUTRAL


def output_settings(settings: Any) -> Any:
    """A branch of the recipe, a model or a dataclass, as plain JSON: those fields alone that affect the output, at
    every depth. Two branches for which it is equal make the same.
    """
    if isinstance(settings, dict):
        return {key: output_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [output_settings(value) for value in settings]
    if isinstance(settings, BaseModel):
        marks = {name: field.metadata for name, field in type(settings).model_fields.items()}
    elif dataclasses.is_dataclass(settings):
        hints = get_type_hints(type(settings), include_extras=True)
        marks = {field.name: getattr(hints[field.name], "__metadata__", []) for field in dataclasses.fields(settings)}
    else:
        return settings
    return {name: output_settings(getattr(settings, name)) for name in marks if OUTPUT_NEUTRAL not in marks[name]}
