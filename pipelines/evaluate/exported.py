"""Evaluates an exported model by itself: `ringworld eval`.

In: the folder of a model, tasks, settings, and a recipe where a task needs a run's data. Out: a folder with

    TASK.json                           the rows of a task, its holes, and what they are of, written when all is done
    cells/TASK-FINGERPRINT/partitions/  the cells, committed one by one: the same command carries on with what is left

The fingerprint is of the model, the seed and all settings that the task depends on, so that no cell is taken for
another.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.dag.manifest import StageOutput, digest, read_manifest
from pipelines.evaluate.cell import Cell, Hole
from pipelines.evaluate.haystack import text_digest
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.named_files import files_digest
from pipelines.evaluate.record import Row
from pipelines.evaluate.run import rows_by_task
from pipelines.evaluate.run_cells import Results, committed, run_cells
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.subject import ExportedSubject
from pipelines.evaluate.task_table import TASKS, settings_key
from pipelines.export.folder import ModelFolder, open_model
from pipelines.recipe import Recipe, output_settings
from pipelines.recipe.data import Storage
from pipelines.recipe.evaluate import Evaluate
from pipelines.sources.list_sources import list_sources
from pipelines.sources.stage import SourcesStage
from storage.errors import UserError
from storage.lease import lease
from storage.public_url import public_url
from storage.store import Store

OUT = "-eval"
"""What the folder of the results is called by default: as that of the model, with this behind it."""


@dataclass(frozen=True)
class Evaluated:
    """What was measured for a task. file: where it lies as JSON."""

    task: str
    rows: tuple[Row, ...]
    holes: tuple[Hole, ...]
    file: str


def evaluate_exported(
    tasks: Sequence[str],
    url: str,
    settings: Evaluate,
    recipe: Recipe | None = None,
    out: str | None = None,
    address: str | None = None,
) -> list[Evaluated]:
    """Measure the tasks on the exported model at a URL.

    settings: of the evaluation, whatever the recipe says. recipe: whose held-out data a task may need. out: a folder
    for the results; None: beside the model. address: of the Ray cluster to join; None starts one on this machine.
    Raises UserError for what the user can mend, before anything runs.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"{unknown[0]}: no such task; name some of {', '.join(TASKS)}, and the model last")
    options = recipe.storage.options if recipe else {}
    folder = open_model(url, options)
    target = Store((out or f"{folder.store.path()}{OUT}").rstrip("/"), options)
    target.check_output("--out")
    tasks = [task for task in TASKS if task in tasks]
    job = _job(tasks, folder, settings, recipe, target)
    for task in tasks:
        if (why := TASKS[task].lacks(job)) is not None:
            raise UserError(f"{task}: {why}")
        TASKS[task].check(job)
    cells = [cell for task in tasks for cell in TASKS[task].cells(job)]
    with lease(target) as store:
        job = dataclasses.replace(job, store=store)
        results, waiting = committed(job, cells)
        if waiting:
            need = Capacity().plus(settings.resources, settings.sp)
            with ray_instance(address, need), bar("eval", len(cells), "cell") as line:
                results = run_cells(job, cells, lambda: line.advance(1))
        return [_written(job, task, cells, results) for task in tasks]


def _job(
    tasks: Sequence[str], folder: ModelFolder, settings: Evaluate, recipe: Recipe | None, target: Store
) -> EvaluateJob:
    subject = ExportedSubject.of_folder(folder, settings.resources.gpus > 0)
    if recipe is None:
        job = EvaluateJob(settings, 0, subject, target, Storage(root=target.url, data=os.getcwd()))
    else:
        job = EvaluateJob.of_run(_run_data(recipe, subject), subject, target)
    job = dataclasses.replace(job, settings=settings)
    return dataclasses.replace(job, folders={task: f"cells/{task}-{_fingerprint(job, task)[:16]}" for task in tasks})


def _run_data(recipe: Recipe, subject: ExportedSubject) -> RunData:
    """What the run of the recipe has made so far. Raises UserError where the model is not of such a recipe."""
    from pipelines.run import plan_recipe  # which knows all stages, that of evaluation too
    from pipelines.tokenize.vocabulary import joint_vocabulary

    vocabulary = joint_vocabulary(recipe)
    if vocabulary.sizes != subject.vocabulary.sizes:
        raise UserError(
            f"{public_url(subject.folder.store.path())}: its vocabulary has {subject.vocabulary.sizes} ids, and that "
            f"of the recipe {recipe.name} {vocabulary.sizes}; give the recipe that the model was trained by"
        )
    outputs: dict[str, StageOutput[Any]] = {}
    for planned in plan_recipe(recipe):
        if planned.status == "done" and (manifest := read_manifest(planned.store, planned.stage.record)):
            outputs[planned.name] = StageOutput(planned.store, manifest)
    return RunData(recipe, vocabulary, outputs, None if SourcesStage.kind in outputs else list_sources(recipe))


def _fingerprint(job: EvaluateJob, task: str) -> str:
    """Of all that the cells of a task depend on."""
    others = {settings_key(one) for one in TASKS} - {settings_key(task)}
    settings = {key: value for key, value in output_settings(job.settings).items() if key not in others}
    subject, inputs = job.subject, dict[str, Any]()
    if job.run is not None:
        inputs = {name: output.manifest.fingerprint for name, output in sorted(job.run.outputs.items())}
        inputs["recipe"] = [job.run.recipe.public_json()["sources"], output_settings(job.run.recipe.tokenize)]
    model = [subject.fingerprint, subject.device, subject.precision]
    text = text_digest(job.settings, job.storage)
    files = files_digest(job.settings, job.storage, f"{settings_key(task)}.")
    return digest([task, model, job.seed, settings, inputs, text, *([files] if files else [])])


def _written(job: EvaluateJob, task: str, cells: Sequence[Cell], results: Results) -> Evaluated:
    rows = rows_by_task(job, [cell for cell in cells if cell.task == task], results).get(task, ())
    holes = tuple(hole for hole in results.holes if hole.task == task)
    name = f"{task}.json"
    tree = {
        "task": task,
        "model": job.subject.name,
        "fingerprint": job.subject.fingerprint,
        "seed": job.seed,
        "settings": output_settings(job.settings),
        "cells": job.folders[task],
        "rows": rows,
        "holes": [dataclasses.asdict(hole) for hole in holes],
    }
    job.store.write_json(name, tree)
    return Evaluated(task, rows, holes, job.store.path(name))
