"""What the evaluate stage commits: figures of the trained models on what they have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipelines.evaluate.cell import Hole

Row = Mapping[str, Any]
"""A line of figures, plain JSON."""


@dataclass(frozen=True)
class EvaluateOutputs:
    """parts: the records of its cells. pictures: PNG files."""

    parts: tuple[str, ...]
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class EvaluateFigures:
    """Rows by task; `further` has those of tasks without a field of their own. holes: cells that are not measured, with
    their reasons.
    """

    heldout: tuple[Row, ...] = ()
    needle: tuple[Row, ...] = ()
    reconstruction: tuple[Row, ...] = ()
    generation: tuple[Row, ...] = ()
    further: Mapping[str, tuple[Row, ...]] | None = None
    holes: tuple[Row, ...] | None = None

    @classmethod
    def of(cls, rows: Mapping[str, tuple[Row, ...]], holes: Sequence[Hole]) -> EvaluateFigures:
        """rows: by task."""
        own = {field.name for field in fields(cls)}
        further = {task: found for task, found in rows.items() if task not in own and found}
        named = {task: found for task, found in rows.items() if task in own}
        return cls(**named, further=further or None, holes=tuple(map(asdict, holes)) or None)

    def rows(self, task: str) -> tuple[Row, ...]:
        """Those of a task."""
        own: tuple[Row, ...] | None = getattr(self, task, None)
        return (self.further or {}).get(task, ()) if own is None else own


@dataclass(frozen=True)
class EvaluateRecord:
    """The stage's record."""

    outputs: EvaluateOutputs
    figures: EvaluateFigures
