"""Cells by groups of workers that are killed, stopped or fail, and by a driver that is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.cli import main
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run_cells import Results, run_cells
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.task_table import all_cells
from storage.store import Store
from testing.committed_run import commit_run
from testing.miniature import environment, ringworld
from testing.tiny_run import VOCABULARY, make_run

pytestmark = pytest.mark.faults

PATIENCE = 240.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    """Of needles alone, by groups of two workers."""
    recipe, outputs = make_run(tmp_path_factory.mktemp("run"))
    run = RunData(recipe, VOCABULARY, outputs)
    made = EvaluateJob.of_run(run, run.trained(run.last), Store(recipe.storage.root).at("stages", "evaluate"))
    pool = recipe.evaluate.resources.model_copy(update={"workers": 2, "cpus": 0.5})
    needle = recipe.evaluate.needle.model_copy(update={"contexts": [256], "depths": 5, "rounds": 3})
    changes = {"needle": needle, "resources": pool, "sp": 2}
    return dataclasses.replace(made, settings=recipe.evaluate.model_copy(update=changes))


def measured(job: EvaluateJob, folder: str, **settings: Any) -> Results:
    changed = job.settings.model_copy(update=settings)
    job = dataclasses.replace(job, settings=changed, store=job.store.at(folder))
    return run_cells(job, all_cells(job, ["needle"]))


@pytest.fixture(scope="module")
def undisturbed_cells(job: EvaluateJob, local_ray: None) -> Results:
    return measured(job, "undisturbed")


def workers_amid_a_cell() -> list[psutil.Process]:
    """Of this process's own Ray: Ray calls a process by what it runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::_Worker.measure"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Disturbance(threading.Thread):
    """Sends a signal to one of the workers amid a cell, once another cell is committed."""

    def __init__(self, committed: Path, number: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.sent: int | None = None
        self._committed, self._number = committed, number
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.sent is None:
            if list(self._committed.glob("*.json")) and (workers := workers_amid_a_cell()):
                os.kill(workers[-1].pid, self._number)
                self.sent = workers[-1].pid
            time.sleep(0.01)


def test_a_cell_whose_worker_is_killed_is_measured_again(job: EvaluateJob, undisturbed_cells: Results) -> None:
    killer = Disturbance(Path(job.store.at("killed").path("partitions")), signal.SIGKILL)
    results = measured(job, "killed")
    assert killer.sent is not None
    assert not psutil.pid_exists(killer.sent)
    assert results.holes == []
    assert results.by_cell == undisturbed_cells.by_cell


def test_a_cell_that_hangs_is_measured_again_by_others(job: EvaluateJob, undisturbed_cells: Results) -> None:
    stopper = Disturbance(Path(job.store.at("stopped").path("partitions")), signal.SIGSTOP)
    results = measured(job, "stopped", cell_seconds=45.0)
    assert stopper.sent is not None
    assert not psutil.pid_exists(stopper.sent)
    assert results.holes == []
    assert results.by_cell == undisturbed_cells.by_cell


def test_one_group_goes_from_cell_to_cell(job: EvaluateJob, undisturbed_cells: Results) -> None:
    """Its workers, and so the model that they have loaded, are the same for all cells; alone it measures alike."""
    seen: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            seen.update(process.pid for process in workers_amid_a_cell())

    thread = threading.Thread(target=look)
    thread.start()
    alone = measured(job, "alone", sp=1, resources=job.settings.resources.model_copy(update={"workers": 1}))
    stop.set()
    thread.join()
    assert len(seen) == 1
    for name, result in undisturbed_cells.by_cell.items():
        for one, other in zip(alone.by_cell[name]["answers"], result["answers"], strict=True):
            assert one["digit_nats"] == pytest.approx(other["digit_nats"], rel=1e-5)
            assert one["answer"] == other["answer"]


@pytest.mark.usefixtures("local_ray")
def test_a_cell_that_fails_leaves_the_others_and_says_why(job: EvaluateJob) -> None:
    """In a group of two, whose ranks all fail, and are replaced for the next cell."""
    own = dataclasses.replace(job, store=job.store.at("failing"))
    good = all_cells(own, ["needle"])[0]
    bad = Cell("needle-16-0", "needle", {"context": 16, "round": 0})
    done: list[None] = []
    results = run_cells(own, [bad, good], lambda: done.append(None))
    (hole,) = results.holes
    assert (hole.cell, hole.task) == ("needle-16-0", "needle")
    assert hole.reason.startswith("evaluate.needle.contexts: 16 tokens leave no room for text")
    assert list(results.by_cell) == [good.name]
    assert len(done) == 2
    assert own.store.names("partitions") == [f"partitions/{good.name}.json"]


def test_a_run_with_holes_reports_them_and_a_rebuild_tries_them_alone_again(undisturbed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.copy(undisturbed.with_name("recipe.yaml"), tmp_path / "recipe.yaml")
    book = tmp_path / "book.txt"
    book.write_bytes(b"\xff\xfe" * 3000)
    settings = {"storage.root": run, "evaluate.needle.contexts": "[128]", "evaluate.text": f"[{book}]"}
    command = ["run", tmp_path / "recipe.yaml"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = ringworld(*command)
    assert done.returncode == 0, done.stderr
    assert "evaluate: 1 of" in done.stderr
    report = json.loads((run / "report.json").read_text())
    (hole,) = report["evaluation"]["holes"]
    assert hole["cell"] == "needle-128-0"
    assert hole["reason"].startswith("evaluate.text: no text can be read")
    assert report["evaluation"]["heldout"]
    assert report["verdicts"][-1]["grade"] == "bad"

    newest = max(run.glob("stages/evaluate/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns).parent
    kept = newest / "partitions" / "reconstruction-heldout.json"
    marked = json.loads(kept.read_text())
    marked["result"]["psnr"] = 77.0
    kept.write_text(json.dumps(marked))
    done = ringworld(*command, "--rebuild", "evaluate")
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    assert [hole["cell"] for hole in report["evaluation"]["holes"]] == ["needle-128-0"]
    assert done.stderr.count("needle-128-0 is a hole") == 1, "it was not tried again"
    assert 77.0 in [row["psnr"] for row in report["evaluation"]["reconstruction"]], "it was measured again"


def test_a_driver_that_is_killed_goes_on_with_the_cells_that_are_left(tmp_path: Path) -> None:
    recipe, _ = commit_run(tmp_path / "home")
    home = tmp_path / "home"
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert main(["export", str(home / "run"), "--out", str(home / "model")]) == 0
    words = ["eval", "needle", str(home / "model"), "--set", f"text={home}/data/*.txt", "--set", "needle.rounds=4"]
    words += ["--set", "needle.contexts=[512]", "--set", "needle.depths=20"]
    command = [sys.executable, "-m", "jobs.cli", *words, "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + PATIENCE
        while not list((tmp_path / "killed").glob("cells/*/partitions/*.json")):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.kill()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("killed/cells/*/partitions/*.json")}
    assert 0 < len(before) < 4
    assert not (tmp_path / "killed" / "needle.json").exists()
    done = ringworld(*words, "--out", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("killed/cells/*/partitions/*.json")}
    assert len(after) == 4
    assert before.items() <= after.items()
    assert ringworld(*words, "--out", tmp_path / "whole").returncode == 0
    assert (tmp_path / "killed" / "needle.json").read_bytes() == (tmp_path / "whole" / "needle.json").read_bytes()
