"""What a train stage commits: a model, and how its training went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainOutputs:
    """model: folder of a Hugging Face Llama. files: sha256 by name."""

    model: str
    files: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None
    rope_theta: float | None = None


@dataclass(frozen=True)
class TrainFigures:
    """interruptions: failures and what became of them. dropped_steps: updates that were not made. rolled_back: steps
    that training went back from. best: the checkpoint of least held-out loss, its step, loss and targets. bad_shards:
    names of those skipped, with what was lost with them.
    """

    steps: int
    tokens: int
    tokens_per_second: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    interruptions: tuple[Mapping[str, Any], ...] | None = None
    dropped_steps: int | None = None
    rolled_back: tuple[Any, ...] | None = None
    best: Mapping[str, Any] | None = None
    bad_shards: tuple[str, ...] | None = None
    lost_sequences: int | None = None
    lost_tokens: int | None = None


@dataclass(frozen=True)
class TrainRecord:
    """The stage's record."""

    outputs: TrainOutputs
    figures: TrainFigures
