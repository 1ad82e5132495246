"""The report stage: one page that opens from disk and one JSON with every figure behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.recipe import Recipe
from pipelines.report.record import ReportRecord


@dataclass(frozen=True)
class ReportStage(Stage[ReportRecord]):
    """before: all stages of the run, in order."""

    kind = "report"
    record = ReportRecord
    output_version = 1
    lane = "model"

    recipe: Recipe
    before: tuple[Stage[Any], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(stage.name for stage in self.before)

    def settings(self) -> Mapping[str, Any]:
        """The title."""
        return {"name": self.recipe.name}

    def run(self, context: StageContext) -> Made[ReportRecord]:
        """Write the page in this process."""
        from pipelines.report.write import write_report

        return Made(write_report(self.recipe, self.before, context.inputs, context.store))
