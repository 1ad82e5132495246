"""All tasks at length and about a user's questions on an exported model, whose every context two workers share."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run import rows_by_task
from pipelines.evaluate.run_cells import run_cells
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.subject import ExportedSubject
from pipelines.evaluate.task_table import TASKS, all_cells
from pipelines.export.folder import open_model
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from pipelines.recipe.evaluate import Evaluate
from pipelines.sources.list_sources import list_sources
from storage.store import Store
from testing.committed_run import commit_run
from testing.miniature import sample
from testing.tiny_run import VOCABULARY

CHOICES = [
    {"question": "What is shown?", "choices": ["a bear", "a man"], "answer": 0, "video": "bear.mp4"},
    {"question": "Where?", "choices": ["in the snow", "in a car"], "answer": "A", "video": "bear.mp4"},
    {"question": "Which colour?", "choices": ["red", "green"], "answer": 1, "image": "dot.png"},
    {"question": "Which?", "choices": [], "answer": 1},
]
ANSWERS = [{"question": "Who did it?", "answers": ["she"], "context": "She did it."}]
NAMES = ("multi-needle", "ruler", "perplexity", "choice", "qa", "video-needle")
SETTINGS: dict[str, Any] = {
    "sp": 2,
    "resources": {"workers": 2, "cpus": 0.5},
    "multi_needle": {"contexts": [400], "cases": [{"hidden": 2, "asked": 1}], "rounds": 1},
    "ruler": {"contexts": [480], "tasks": ["vt"], "examples": 1},
    "perplexity": {"context": 128, "windows": 2},
    "choice": {"made": {"file": "choices.jsonl", "frames": 4}},
    "qa": {"made": {"file": "answers.jsonl", "answer_tokens": 4}},
    "video_needle": {"frames": [6], "depths": 2, "rounds": 1, "questions": "choices.jsonl"},
}


@pytest.fixture
def job(tmp_path: Path) -> EvaluateJob:
    """Of the last model of a run, exported, with the run's held-out data and questions about a real clip."""
    recipe, _ = commit_run(tmp_path / "home")
    export_model(find_trained(recipe.storage.root), Store(str(tmp_path / "model")))
    data = Path(recipe.storage.data)
    shutil.copy(sample("gradio", "media_assets/videos/b.mp4"), data / "bear.mp4")
    Image.fromarray(np.full((24, 24, 3), (30, 200, 60), np.uint8)).save(data / "dot.png")
    for name, rows in (("choices", CHOICES), ("answers", ANSWERS)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = RunData(recipe, VOCABULARY, listing=list_sources(recipe))
    subject = ExportedSubject.of_folder(open_model(str(tmp_path / "model")))
    store, settings = Store(str(tmp_path / "out")), Evaluate.model_validate(SETTINGS)
    return EvaluateJob(settings, 3, subject, store, recipe.storage, run=run)


@pytest.mark.faults  # for its length
@pytest.mark.usefixtures("local_ray")
def test_two_workers_measure_every_task_and_score_choices_as_one_does(job: EvaluateJob) -> None:
    for name in NAMES:
        assert TASKS[name].lacks(job) is None
        TASKS[name].check(job)
    cells = all_cells(job, NAMES)
    results = run_cells(job, cells)
    assert results.holes == []
    rows = rows_by_task(job, cells, results)
    assert {name: len(found) for name, found in rows.items()} == {
        "multi-needle": 1,
        "ruler": 1,
        "perplexity": 7,
        "choice": 1,
        "qa": 1,
        "video-needle": 1,
    }
    (choice,) = rows["choice"]
    assert (choice["asked"], choice["left_out"]) == (3, 1)
    (cell,) = (cell for cell in cells if cell.task == "choice")
    alone = replace(job, settings=job.settings.model_copy(update={"sp": 1}))
    of_two = results.by_cell[cell.name]["answers"]
    for one, two in zip(TASKS["choice"].measure(alone, cell)["answers"], of_two, strict=True):
        np.testing.assert_allclose(one["log_probability"], two["log_probability"], rtol=0, atol=1e-4)
        assert (one["tokens"], one["right"]) == (two["tokens"], two["right"])
