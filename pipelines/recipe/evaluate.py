"""What is measured of a trained model: a class of settings a task, and what the evaluation runs on.

A task whose settings are None is not measured by a recipe. A key that is added here is `NeutralUntilSet`, so that
evaluations that do not set it stay what they were.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from pipelines.recipe.base import Config, Resources
from pipelines.recipe.evaluation_tasks import (
    MultiNeedle,
    NamedChoices,
    NamedShortAnswers,
    Perplexity,
    Ruler,
    VideoNeedle,
)
from storage.setting_types import Above0, AtLeast0, Count, NeutralUntilSet, OutputNeutral, Positive, Text

Texts = Annotated[list[Text], Field(min_length=1), BeforeValidator(lambda one: [one] if isinstance(one, str) else one)]
"""URLs, of which a single one needs no list."""


class Needle(Config):
    """Needle in a haystack: context x depth."""

    contexts: list[Positive] = Field(min_length=1)
    depths: Positive = 5
    rounds: Positive = 1


class Generation(Config):
    """Frames generated as continuation of a held-out clip and from text."""

    prompt_frames: Positive = 4
    frames: Positive = 4
    windows: NeutralUntilSet[Positive] = None
    """Windows of held-out clips that are continued, at most; None: 4."""
    prompts: list[str] = Field(default_factory=list)
    guidance: AtLeast0 = 1.0
    top_k: Positive = 1000
    temperature: AtLeast0 = 1.0


class Evaluate(Config):
    """What is measured at the end."""

    max_sequences: Positive = 64
    """Held-out sequences scored at most, per stage and source."""
    needle: Needle | None = None
    generation: Generation | None = None
    reconstructions: Count = 8
    """Held-out frames shown beside their reconstruction."""
    multi_needle: NeutralUntilSet[MultiNeedle] = None
    ruler: NeutralUntilSet[Ruler] = None
    perplexity: NeutralUntilSet[Perplexity] = None
    choice: NeutralUntilSet[NamedChoices] = None
    """Files of multiple choice, each by the name that it has in the report."""
    qa: NeutralUntilSet[NamedShortAnswers] = None
    """Files of questions with short answers, likewise."""
    video_needle: NeutralUntilSet[VideoNeedle] = None
    text: NeutralUntilSet[Texts] = None
    """Texts that fill the contexts of needles and the like: fsspec URLs with globs, relative ones below `storage.data`.
    None: those that the recipe's sources hold out."""
    resources: OutputNeutral[Resources] = Resources()
    """Of one worker, and how many there are. A worker holds the model and measures one cell after another."""
    sp: OutputNeutral[Positive] = 1
    """Workers that share the context of one cell; there are `resources.workers` // `sp` such groups. Figures agree to
    rounding whatever it is."""
    device_memory: OutputNeutral[Above0 | None] = None
    """GiB of a worker's device, less what the process itself takes of it. A recipe whose evaluation does not fit is
    refused before anything runs; None: it is not checked."""
    cell_seconds: OutputNeutral[Above0] = 6 * 3600.0
    """A cell that takes longer hangs: its workers are replaced."""

    @model_validator(mode="after")
    def _workers_make_a_group(self) -> Evaluate:
        if self.resources.workers % self.sp:
            raise ValueError(
                f"evaluate.sp {self.sp} does not divide evaluate.resources.workers {self.resources.workers}; choose an "
                f"sp that divides it or change the workers"
            )
        return self
