"""What shows before anything runs that an evaluation can only fail."""

from __future__ import annotations

from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.subject import PlannedSubject
from pipelines.evaluate.task_table import TASKS
from pipelines.recipe import Recipe
from pipelines.sources.listing import Listing
from storage.store import Store


def check_tasks(recipe: Recipe, objects: Listing) -> None:
    """Raise UserError for settings of `evaluate` that can only fail. objects: the listing of the recipe's sources."""
    from pipelines.tokenize.vocabulary import joint_vocabulary  # a tokenizer's imports take time

    vocabulary = joint_vocabulary(recipe)
    run = RunData(recipe, vocabulary, listing=objects)
    job = EvaluateJob.of_run(run, PlannedSubject.of_recipe(recipe, vocabulary), Store(recipe.storage.root))
    for task in TASKS.values():
        if task.lacks(job) is None:
            task.check(job)
