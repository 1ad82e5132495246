"""SIGINT, SIGTERM and SIGHUP end a run in order: one sentence, 128 + the signal, no process left, the lease released.

SIGTERM while training commits a checkpoint first. Real drivers, signalled while they tokenize and while they train.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from pipelines.dag.manifest import STARTED
from pipelines.train.metrics.steps import read_metrics
from storage.lease import LEASE
from storage.store import Store
from testing.drivers import Driver
from testing.miniature import text_recipe, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS = 100_000  # more than any machine makes before the signal
PATIENCE = 30.0  # for the last of Ray's processes


def recipe_of(sources: Path, folder: Path, **train: object) -> Path:
    """A recipe whose training goes on until it is stopped, and commits no checkpoint of itself."""
    tree = text_recipe(sources, folder / "run")
    tree["train"] |= {"checkpoint_steps": STEPS, "heldout": None, "grace_seconds": 120, **train}
    tree["train"]["stages"][0] |= {"steps": STEPS}
    return write_recipe(folder / "recipe.yaml", tree)


def steps_shown(driver: Driver) -> int:
    """How far the bar of the training is."""
    return max((int(done) for done in re.findall(rf" (\d+)/{STEPS} ", driver.log.read_text())), default=0)


def stop(driver: Driver, number: signal.Signals, folder: Path) -> None:
    """Send the signal, and see that nothing is left of the run but what it has made."""
    said_before = len(driver.log.read_text())
    driver.process.send_signal(number)
    assert driver.end() == (
        128 + number,
        f"ringworld: stopped by {number.name}; run the same command again to carry on",
    )
    # Ray Train's controller logs a traceback of its own where its requests take long, as on a busy machine.
    lines = [line for line in driver.log.read_text()[said_before:].splitlines() if "(TrainController " not in line]
    assert not any("Traceback" in line or "*** SIG" in line for line in lines), "nor of native stacks"
    deadline = time.monotonic() + PATIENCE
    while (left := driver.living()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert not (folder / "run" / LEASE).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_run_in_order_while_it_tokenizes_and_while_it_trains(
    sources: Path, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = recipe_of(sources, tmp_path)
    driver = Driver.start(recipe, "tokenizing")
    try:
        driver.until(lambda: bool(list(tmp_path.glob(f"run/stages/tokenize/*/{STARTED}"))), watch=False)
        stop(driver, number, tmp_path)
    finally:
        driver.kill()
    assert not list(tmp_path.glob("run/stages/tokenize/*/manifest.json")), "it was still at work"

    driver = Driver.start(recipe, "training")
    try:
        driver.until(lambda: steps_shown(driver) > 0)
        stop(driver, number, tmp_path)
    finally:
        driver.kill()
    commits = [int(path.parent.name[5:]) for path in tmp_path.glob("run/stages/train-text/*/checkpoints/*/COMMIT")]
    if number != signal.SIGTERM:
        assert commits == []
        return

    (step,) = commits
    assert step >= steps_shown(driver)
    assert f"stops at step {step}, on request" in driver.log.read_text()
    (folder,) = tmp_path.glob("run/stages/train-text/*")
    assert [line["step"] for line in read_metrics(Store(str(folder)))] == list(range(step))
    driver = Driver.start(recipe, "again")
    try:
        driver.until(lambda: f"carries on at step {step}" in driver.log.read_text())
        driver.until(lambda: steps_shown(driver) > step)
        stop(driver, signal.SIGINT, tmp_path)
    finally:
        driver.kill()


def test_a_second_signal_ends_the_run_without_the_checkpoint(sources: Path, tmp_path: Path) -> None:
    driver = Driver.start(recipe_of(sources, tmp_path, grace_seconds=10_000), "training")
    try:
        driver.until(lambda: steps_shown(driver) > 0)
        workers = [process for process, command in driver.processes() if "ray::RayTrainWorker" in command]
        assert workers
        for worker in workers:
            worker.suspend()  # so that no checkpoint can come
        driver.process.send_signal(signal.SIGTERM)
        driver.until(lambda: "saving a checkpoint after this step" in driver.log.read_text())
        stop(driver, signal.SIGTERM, tmp_path)
    finally:
        driver.kill()
    assert not list(tmp_path.glob("run/stages/train-text/*/checkpoints/*/COMMIT"))


def test_a_checkpoint_that_takes_longer_than_the_grace_is_not_waited_for(sources: Path, tmp_path: Path) -> None:
    driver = Driver.start(recipe_of(sources, tmp_path, grace_seconds=0), "training")
    try:
        driver.until(lambda: steps_shown(driver) > 0)
        stop(driver, signal.SIGTERM, tmp_path)
    finally:
        driver.kill()
