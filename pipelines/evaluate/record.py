"""What the evaluate stage commits: figures of the trained models on what they have not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A line of figures, plain JSON."""


@dataclass(frozen=True)
class EvaluateOutputs:
    """parts: the records of its parts. pictures: PNG files."""

    parts: tuple[str, ...]
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class EvaluateFigures:
    """Rows by what was measured."""

    heldout: tuple[Row, ...] = ()
    needle: tuple[Row, ...] = ()
    reconstruction: tuple[Row, ...] = ()
    generation: tuple[Row, ...] = ()


@dataclass(frozen=True)
class EvaluateRecord:
    """The stage's record."""

    outputs: EvaluateOutputs
    figures: EvaluateFigures
