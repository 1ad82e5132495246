"""The evaluate stage: what the trained models are worth on what they have not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import Manifest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.evaluate.haystack import text_digest
from pipelines.evaluate.named_files import files_digest
from pipelines.evaluate.record import EvaluateRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Recipe, output_settings
from pipelines.report.numbers import count_of
from pipelines.train.stage import TrainStage


@dataclass(frozen=True)
class EvaluateStage(Stage[EvaluateRecord]):
    """codec: the name of the stage that makes the codec; None where all is text."""

    kind = "evaluate"
    record = EvaluateRecord
    output_version = 2
    libraries = ("torch", "transformers", "diffusers", "torchmetrics")
    lane = "model"

    recipe: Recipe
    codec: str | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The listing, the codec, and the shards and models of all training stages."""
        names = [stage.name for stage in self.recipe.curriculum]
        codec = (self.codec,) if self.codec else ()
        return ("sources", *codec, *map(PackStage.named, names), *map(TrainStage.named, names))

    def settings(self) -> Mapping[str, Any]:
        """What is measured, and which texts and questions it is measured with where the recipe names some."""
        settings = {"evaluate": output_settings(self.recipe.evaluate), "seed": self.recipe.seed}
        text = text_digest(self.recipe.evaluate, self.recipe.storage)
        files = files_digest(self.recipe.evaluate, self.recipe.storage)
        return {**settings, **({"text": text} if text else {}), **({"files": files} if files else {})}

    def resources(self) -> Capacity:
        """One group of workers."""
        return Capacity().plus(self.recipe.evaluate.resources, self.recipe.evaluate.sp)

    def check(self) -> None:
        """Raise UserError where the evaluation does not fit its workers' devices."""
        if self.recipe.evaluate.device_memory is not None:
            from pipelines.evaluate.memory import check_evaluation

            check_evaluation(self.recipe)

    def run(self, context: StageContext) -> Made[EvaluateRecord]:
        """Measure every cell on the cluster."""
        from pipelines.evaluate.job import EvaluateJob
        from pipelines.evaluate.rebuilt import take_cells_before
        from pipelines.evaluate.run import evaluate_all
        from pipelines.evaluate.run_data import RunData
        from pipelines.tokenize.vocabulary import joint_vocabulary

        run = RunData(self.recipe, joint_vocabulary(self.recipe), context.inputs)
        job = EvaluateJob.of_run(run, run.trained(run.last), context.store)
        take_cells_before(context.store)
        with bar(self.name, None, "cell") as line:
            return Made(evaluate_all(job, line))

    def summary(self, manifest: Manifest[EvaluateRecord]) -> tuple[str, ...]:
        """Cells, holes and pictures."""
        outputs, holes = manifest.record.outputs, manifest.record.figures.holes or ()
        counts = (count_of(len(outputs.parts), "cells"), count_of(len(outputs.pictures), "pictures"))
        return (*counts[:1], count_of(len(holes), "holes"), *counts[1:]) if holes else counts
