"""What the report stage commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReportOutputs:
    """Names of the two files, in the stage's folder and in the run's root."""

    html: str
    json: str


@dataclass(frozen=True)
class ReportFigures:
    """bytes: of the page."""

    verdicts: tuple[Mapping[str, str], ...]
    bytes: int


@dataclass(frozen=True)
class ReportRecord:
    """The stage's record."""

    outputs: ReportOutputs
    figures: ReportFigures
