"""A driver killed amid tokenize, pack and train and started again ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.train.metrics.steps import read_metrics
from storage.local_files import TEMPORARY_PREFIX, is_temporary
from storage.store import Store
from testing.miniature import environment, recipe, ringworld, write_recipe
from testing.tensorboard_events import shown_by_tensorboard, shown_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]

MARK = "RINGWORLD_TEST_RUN"
SOON, GRACE = 10.0, 60.0  # seconds
OF_THE_LAST_RUN = ("tokens_per_second", "bytes", "frames_encoded", "partitions_made")  # figures
TIMED = ("checkpoints", "metrics", "tensorboard", "profile", "report")  # folders
# A stage, and how many of these must be committed in its folder for it to be in the middle.
MOMENTS = (
    ("tokenize", "documents/*.parquet", 2),
    ("pack-text", "partitions/*.json", 2),
    ("train-text", "*/checkpoints/*/COMMIT", 1),
)
COMMITTED = ("documents", "partitions")  # folders of the stages that have them


@dataclass
class Killed:
    """A run killed at every one of `MOMENTS` and carried on to the end."""

    root: Path
    recipe: Path
    committed: dict[str, dict[Path, int]]  # by the stage killed: files of partitions then committed, and when
    servers: dict[str, list[str]]  # by the stage killed: raylets and the like that would not end
    marks: list[str]  # of the drivers killed, which all their processes carry
    said: str  # by the last driver


@pytest.fixture(scope="module")
def killed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    root, path = folder / "run", folder / "recipe.yaml"
    write_recipe(path, recipe(sources, root))
    run = Killed(root, path, {}, {}, [], "")
    for stage, pattern, count in MOMENTS:
        log = folder / f"{stage}.log"
        mark = kill_driver(path, log, lambda: len(list(root.glob(f"stages/{stage}/{pattern}"))) >= count)  # noqa: B023
        manifests = list(root.glob(f"stages/{stage}/*/manifest.json"))
        assert not manifests, f"{stage} was over before the kill"
        run.servers[stage] = left_after(SOON, mark, ("/raylet/raylet", "/gcs/gcs_server", "/dashboard/"))
        run.marks.append(mark)
        committed = [file for folder in COMMITTED for file in root.glob(f"stages/*/{folder}/*")]
        run.committed[stage] = {file: file.stat().st_mtime_ns for file in committed if not is_temporary(file.name)}
    done = ringworld("run", path)
    assert done.returncode == 0, done.stderr
    run.said = done.stderr
    return run


def kill_driver(path: Path, log: Path, when: Callable[[], bool]) -> str:
    """Start the command, SIGKILL it as soon as `when` holds; the mark that all its processes carry."""
    mark = uuid.uuid4().hex
    with log.open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "run", str(path)],
            env=environment(**{MARK: mark}),
            stdout=said,
            stderr=said,
        )
        deadline = time.monotonic() + 240
        while not when():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    return mark


def left_after(seconds: float, mark: str, kinds: tuple[str, ...] = ("",)) -> list[str]:
    """Command lines of processes with this mark that live on for so many seconds, of these kinds."""
    deadline = time.monotonic() + seconds
    while True:
        left = [line for line in map(command_line, marked(mark)) if any(kind in line for kind in kinds)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def outputs(root: Path) -> dict[str, str]:
    """sha256 of all that is a pure function of the recipe: everything but clocks and optimizer state.

    Records of partitions are written in bulk as they come: they are compared as a whole, in order.
    """
    hashes = {}
    for path in sorted((root / "stages").rglob("*")):
        name = path.relative_to(root).as_posix()
        timed = path.name == "manifest.json" or any(f"/{folder}/" in name for folder in (*TIMED, "records"))
        if path.is_file() and not timed:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [line for path in root.glob("stages/tokenize/records/*.jsonl") for line in path.read_bytes().splitlines()]
    hashes["stages/tokenize/records"] = hashlib.sha256(b"\n".join(sorted(set(lines)))).hexdigest()
    return hashes


def manifests(root: Path) -> dict[str, Any]:
    """What the manifests say, but for clocks and for how much was left to do when the stage was started last."""
    found = {}
    for path in sorted((root / "stages").glob("*/*/manifest.json")):
        manifest = json.loads(path.read_text())
        del manifest["seconds"], manifest["finished"]
        manifest["figures"] = {k: v for k, v in manifest["figures"].items() if k not in OF_THE_LAST_RUN}
        found[path.relative_to(root).as_posix()] = manifest
    return found


def steps(stage: Store) -> list[dict[str, Any]]:
    """The metrics of a train stage's steps, but for clocks."""
    return [
        {k: v for k, v in step.items() if k != "machine" and not k.endswith("seconds")}
        for step in read_metrics(stage.at(*stage.folders()))
    ]


def test_every_output_is_byte_identical_to_an_undisturbed_runs(killed: Killed, undisturbed: Path) -> None:
    expected = outputs(undisturbed)
    assert sum(name.endswith(".tar") for name in expected) > 20
    assert sum("/documents/" in name for name in expected) == 11
    assert sum(name.endswith("model.safetensors") and "/train-" in name for name in expected) == 2
    assert outputs(killed.root) == expected
    assert manifests(killed.root) == manifests(undisturbed)


def test_what_was_committed_before_the_kill_is_not_made_again(killed: Killed) -> None:
    for stage, *_ in MOMENTS:
        assert killed.committed[stage]
        for record, when in killed.committed[stage].items():
            assert record.stat().st_mtime_ns == when, record


def test_training_carries_on_from_the_checkpoint_with_the_exact_next_sequences(
    killed: Killed, undisturbed: Path
) -> None:
    assert "carries on at step" in killed.said
    assert re.search(
        r"train-video: starts from the fp32 weights at \S*/train-text/\w+/checkpoints, step 12", killed.said
    )
    for stage, count in (("train-text", 12), ("train-video", 4)):
        expected, found = (steps(Store(str(root)).at("stages", stage)) for root in (undisturbed, killed.root))
        assert [step["step"] for step in expected] == list(range(count))
        assert found == expected, "losses, gradient norms and target counts of every step"


def test_tensorboard_shows_every_step_once_through_the_kill(killed: Killed) -> None:
    for stage in ("train-text", "train-video"):
        (folder,) = (killed.root / "stages" / stage).iterdir()
        assert shown_by_tensorboard(folder / "tensorboard") == shown_of(read_metrics(Store(str(folder))))


def test_no_process_outlives_its_driver(killed: Killed) -> None:
    assert killed.servers == {stage: [] for stage, _, _ in MOMENTS}, "Ray ends with the driver at once"
    for mark in killed.marks:
        assert left_after(GRACE, mark) == [], "a worker that was just starting gives up looking for its raylet"


def test_no_half_written_file_is_left(killed: Killed) -> None:
    assert not [path for path in killed.root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
    assert not (killed.root / "lease.json").exists()


def test_a_second_run_is_all_cached_and_starts_no_ray(killed: Killed) -> None:
    before = {path: path.stat().st_mtime_ns for path in killed.root.rglob("*")}
    started = time.monotonic()
    again = ringworld("run", killed.recipe)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 60
    assert "ray" not in again.stderr
    assert again.stderr.count(" done ") == 9
    assert again.stdout == f"report: {killed.root}/report.html\n"
    assert {path: path.stat().st_mtime_ns for path in killed.root.rglob("*")} == before
