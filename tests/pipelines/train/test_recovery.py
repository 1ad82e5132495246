"""Training goes on through killed and stopped workers, a lost controller and node, and from 4 workers to 2 to 3."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.train.metrics.steps import read_metrics
from storage.store import Store
from testing.ray_nodes import RayNodes
from testing.training_driver import CHECKPOINT_STEPS, STEPS

pytestmark = pytest.mark.faults

log = logging.getLogger(__name__)

PATIENCE = 480.0
HANG_SECONDS = 12.0


@dataclass
class Training:
    """A driver on a cluster whose nodes and workers come and go."""

    folder: Path
    address: str
    nodes: RayNodes
    driver: subprocess.Popen[str]

    def start(self, name: str, trainers: int, **train: Any) -> None:
        """Have the driver train a stage as soon as there are nodes for so many trainers; train: keys of the recipe."""
        assert self.driver.stdin is not None
        self.driver.stdin.write(json.dumps({"name": name, "trainers": trainers, **train}) + "\n")
        self.driver.stdin.flush()

    def finish(self, name: str) -> dict[str, Any]:
        """Wait for the stage's end; its part of the manifest."""
        self.until((self.folder / f"{name}.json").exists)
        return json.loads((self.folder / f"{name}.json").read_text())  # type: ignore[no-any-return]

    def checkpoints(self, name: str) -> int:
        """The step of the last checkpoint that is committed."""
        return max((int(p.parent.name[5:]) for p in (self.folder / name).glob("checkpoints/*/COMMIT")), default=0)

    def trained_until(self, name: str, step: int) -> None:
        self.until(lambda: self.checkpoints(name) >= step)
        assert self.checkpoints(name) < STEPS, "the stage was over before it could be disturbed"

    def until(self, when: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert self.driver.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def add_node(self, trainers: int) -> subprocess.Popen[bytes]:
        return self.nodes.join(self.address, trainers, "trainer", trainers)

    def living(self, actor: str) -> list[psutil.Process]:
        """Processes of the actors of this class that live, the oldest first."""
        found = []
        for node in self.nodes.nodes:
            for process in self.nodes.processes(node):
                try:
                    if f"ray::{actor}" in " ".join(process.cmdline()):
                        found.append((process.create_time(), process))
                except psutil.Error:
                    continue
        return [process for _, process in sorted(found, key=lambda one: one[0])]

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """All of a node at once, as when a machine loses its power."""
        for process in self.nodes.processes(node):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "model" / "model.safetensors").read_bytes()

    def steps(self, name: str) -> list[dict[str, Any]]:
        return list(read_metrics(Store(str(self.folder / name))))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    folder, nodes = tmp_path_factory.mktemp("training"), RayNodes()
    driver = None
    try:
        address = nodes.start_head()
        with (folder / "log").open("wb") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "testing.training_driver", str(folder)],
                env=nodes.environment(RAY_ADDRESS=address),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        run = Training(folder, address, nodes, driver)
        run.add_node(2)
        run.start("undisturbed", 2, workers=2)
        run.finish("undisturbed")
        yield run
    finally:
        if driver is not None:
            driver.kill()
            driver.wait()
        nodes.stop()


def test_kills_a_stop_and_a_lost_node_leave_no_trace_in_the_weights(training: Training) -> None:
    measured = {"steps": 2, "max_sequences": 3, "sample_tokens": 4}
    training.start("disturbed", 2, workers=2, hang_seconds=HANG_SECONDS, keep_checkpoints=1, heldout=measured)
    training.trained_until("disturbed", 1)
    training.living("RayTrainWorker")[0].send_signal(signal.SIGKILL)
    training.trained_until("disturbed", 16)
    training.living("RayTrainWorker")[-1].send_signal(signal.SIGSTOP)
    training.trained_until("disturbed", 32)
    training.living("TrainController")[-1].send_signal(signal.SIGKILL)
    training.trained_until("disturbed", 48)
    training.add_node(2)  # elsewhere
    training.kill_node(training.nodes.nodes[1])
    figures = training.finish("disturbed")["figures"]

    assert training.weights("disturbed") == training.weights("undisturbed")
    by_step = [(step["step"], step["loss"], step["grad_norm"]) for step in training.steps("disturbed")]
    assert by_step == [(step["step"], step["loss"], step["grad_norm"]) for step in training.steps("undisturbed")]
    # It was measured all the while, each time once, and its best checkpoint is there.
    losses = {step["step"] + 1: step["heldout"]["loss"] for step in training.steps("disturbed") if "heldout" in step}
    assert list(losses) == list(range(2, STEPS + 1, 2))
    best = min((step for step in losses if step % CHECKPOINT_STEPS == 0), key=lambda step: losses[step])
    assert (figures["best"]["step"], figures["best"]["loss"]) == (best, losses[best])
    kept = sorted(path.name for path in (training.folder / "disturbed" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in sorted({best, STEPS})]
    # More than these where the machine is too busy to answer in time, and is taken for one that hangs.
    interruptions = figures["interruptions"]
    killed, *others, lost = interruptions
    assert "rank" in killed["reason"]
    assert "Error" in killed["reason"]
    assert any(re.search(r"rank \d \(process \d+ on node \w+\) has not answered for", one["reason"]) for one in others)
    assert any(one["reason"].startswith("the controller of the group died") for one in others)
    assert lost["step"] >= 48
    for one in interruptions:
        assert one["step"] % CHECKPOINT_STEPS == 0
        assert (one["workers"], one["seconds"]) == (None, None) or (one["workers"] == 2 and one["seconds"] > 0)
    assert lost["workers"] == 2
    log.info("interruptions\n%s", json.dumps(figures["interruptions"], indent=1))


def test_from_four_workers_to_two_to_three_the_sequences_and_the_losses_are_the_same(training: Training) -> None:
    other = training.add_node(2)
    training.start("elastic", 4, workers=4, min_workers=2)
    training.until(lambda: "4 workers start" in training.said())
    training.trained_until("elastic", 1)
    training.kill_node(other)
    training.until(lambda: "2 workers start" in training.said().split("4 workers start")[1])
    training.add_node(1)
    figures = training.finish("elastic")["figures"]

    said = training.said().split("4 workers start")[1]
    assert "3 workers start" in said, "it grows when there is room again"
    steps, expected = training.steps("elastic"), training.steps("undisturbed")
    assert [step["step"] for step in steps] == list(range(STEPS))
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["text_targets"] == theirs["text_targets"], "the same sequences"
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert any(one["workers"] == 2 for one in figures["interruptions"])
