"""What branches of a recipe have in common: the strict base class, types, pools of workers, what affects the output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.errors import UserError
from storage.setting_types import NEUTRAL_UNTIL_SET, OUTPUT_NEUTRAL, Above0, AtLeast0, Positive, Text

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Config(BaseModel):
    """A branch of the tree: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@contextlib.contextmanager
def user_error_as_value_error() -> Iterator[None]:
    """Let pydantic report a component's own UserError with the recipe's name."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from None


def field_types(branch: type[Any]) -> dict[str, Any]:
    """The types of a branch's fields by key, with their annotations; a branch is a `Config` or a dataclass."""
    if issubclass(branch, BaseModel):
        return {name: field.rebuild_annotation() for name, field in branch.model_fields.items()}
    hints = get_type_hints(branch, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(branch)}


def output_settings(settings: Any) -> Any:
    """A branch of the recipe, a `Config` or a dataclass, as plain JSON: those fields alone that affect the output, at
    every depth. Two branches for which it is equal make the same output.
    """
    if isinstance(settings, dict):
        return {key: output_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [output_settings(value) for value in settings]
    if not isinstance(settings, BaseModel) and not dataclasses.is_dataclass(settings):
        return settings
    types = field_types(type(settings))
    marks = {name: getattr(types[name], "__metadata__", ()) for name in types}
    neutral = {name for name in types if OUTPUT_NEUTRAL in marks[name]}
    neutral |= {name for name in types if NEUTRAL_UNTIL_SET in marks[name] and getattr(settings, name) is None}
    return {name: output_settings(getattr(settings, name)) for name in types if name not in neutral}


class Resources(Config):
    """What one task or actor of a pool asks of Ray, and how many of them run."""

    cpus: AtLeast0 = 1.0
    gpus: AtLeast0 = 0.0
    custom: dict[Text, AtLeast0] = Field(default_factory=dict)
    """Custom Ray resources, by which cluster.yaml says which pool a stage lands on."""
    workers: Positive = 1
    """Tasks in flight, or actors in the pool."""

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker asks for, by the names of Ray's resources, without those of which it asks for none."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in amounts.items() if amount > 0}

    @property
    def ray_options(self) -> dict[str, Any]:
        """What one worker asks for, as the options of a Ray task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.custom}


class EncoderResources(Resources):
    """A pool of encoders that grows from `min_workers` to `workers` while frames wait, and shrinks when none come."""

    min_workers: Positive = 1
    idle_seconds: Above0 = 60.0
    """How long an encoder above `min_workers` may have nothing to do before it gives its place back."""

    @model_validator(mode="after")
    def _is_a_range(self) -> EncoderResources:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; raise workers")
        return self
