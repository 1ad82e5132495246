"""The unit of work, of retry and of resume of an evaluation, and what is left where one could not be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One thing to be measured.

    name: unique in the evaluation; its record is `partitions/NAME.json`. task: one of `task_table.TASKS`. arguments:
    plain JSON, for the task's `measure`.
    """

    name: str
    task: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hole:
    """A cell that could not be measured, and why, in a sentence."""

    cell: str
    task: str
    reason: str
