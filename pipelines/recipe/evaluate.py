"""What is measured at the end."""

from __future__ import annotations

from pydantic import Field

from pipelines.recipe.base import Config, Resources
from storage.setting_types import OutputNeutral, Positive


class Needle(Config):
    """Needle in a haystack: context x depth."""

    contexts: list[int] = Field(min_length=1)
    depths: Positive = 5
    rounds: Positive = 1


class Generation(Config):
    """Frames generated as continuation of a held-out clip and from text."""

    prompt_frames: Positive = 4
    frames: Positive = 4
    prompts: list[str] = Field(default_factory=list)
    guidance: float = 1.0
    top_k: Positive = 1000
    temperature: float = 1.0


class Evaluate(Config):
    """What is measured at the end."""

    max_sequences: Positive = 64
    """Held-out sequences scored at most, per stage and source."""
    needle: Needle | None = None
    generation: Generation | None = None
    reconstructions: int = 8
    """Held-out frames shown beside their reconstruction."""
    resources: OutputNeutral[Resources] = Resources()
