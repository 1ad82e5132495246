"""Twenty SIGKILLs at random moments of one run, of every kind of process that it has, and its shards are those of a run
that nothing disturbed.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from testing.miniature import recipe, write_recipe
from testing.ray_nodes import RayNodes
from tests.pipelines.test_resume import manifests, outputs

pytestmark = pytest.mark.faults

VICTIMS = {"worker": 7, "decoder": 3, "encoder": 3, "pool": 2, "driver": 3, "node": 2}
TITLES = {
    "pool": "ray::_EncoderPool",
    "encoder": "ray::_Encoder",
    "worker": ("ray::tokenize", "ray::pack"),
}
DATA_STAGES = ("sources", "vqgan", "tokenize", "pack-video")
PATIENCE = 300.0  # seconds: on a busy machine a stage may take a minute to begin
LULL = 0.5  # seconds at most from finding a victim to its end


@dataclass
class Battered:
    """A run on three nodes, and what becomes of its processes."""

    recipe: Path
    root: Path
    log: Path
    address: str
    nodes: RayNodes
    driver: subprocess.Popen[bytes] | None = None
    killed: Counter[str] = field(default_factory=Counter)
    offers: list[str] = field(default_factory=lambda: [""])  # by node
    placed: dict[str, set[str]] = field(default_factory=dict)  # what the nodes offer on which a kind was seen

    def start_driver(self) -> None:
        with self.log.open("ab") as said:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "run", str(self.recipe)],
                env=self.nodes.environment(RAY_ADDRESS=self.address),
                stdout=said,
                stderr=said,
            )

    def add_node(self, resource: str) -> None:
        """A node that offers one kind of place, as a pool of machines with GPUs or without does."""
        self.nodes.join(self.address, 2, resource, 2)
        self.offers.append(resource)

    def victims(self) -> dict[str, list[psutil.Process]]:
        """What there is to kill now, by kind."""
        found: dict[str, list[psutil.Process]] = {}
        for node, offer in zip(self.nodes.nodes, self.offers):
            for process in self.nodes.processes(node):
                if kind := kind_of(process):
                    found.setdefault(kind, []).append(process)
                    self.placed.setdefault(kind, set()).add(offer)
        if found and self.driver is not None and self.driver.poll() is None:  # at work, and not just starting
            found["driver"] = [psutil.Process(self.driver.pid)]
            found["node"] = [raylet for node in self.nodes.nodes[1:] for raylet in raylets(node)]
        return {kind: left for kind, left in found.items() if left and self.killed[kind] < VICTIMS[kind]}

    def kill_one(self) -> None:
        """Kill something at random, as soon as there is something that has not been killed often enough."""
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline, f"nothing left to kill but {self.killed}: {self.said()}"
            if self.driver is not None and self.driver.poll() is not None:
                assert self.driver.returncode, f"the run was over after {self.killed}: {self.said()}"
                self.start_driver()  # it went down with its node
            if not (there := self.victims()):
                time.sleep(0.1)
                continue
            time.sleep(random.random() * LULL)
            kind = random.choice(list(there))
            victim = random.choice(there[kind])
            try:
                node = victim.ppid() if kind == "node" else 0
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            break
        self.killed[kind] += 1
        if kind == "driver":
            assert self.driver is not None
            self.driver.wait()
            self.start_driver()
        if kind == "node":
            (offer,) = [offer for one, offer in zip(self.nodes.nodes, self.offers) if one.pid == node]
            self.add_node(offer)

    def wait_until_packed(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not list(self.root.glob("stages/pack-video/*/manifest.json")):
            assert time.monotonic() < deadline, self.said()
            if self.driver is not None and self.driver.poll() is not None:
                self.start_driver()  # it went down with its node
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]


def kind_of(process: psutil.Process) -> str | None:
    """What a process does for the data plane, by its title; only workers that have something to do have one."""
    try:
        said = " ".join(process.cmdline())
    except psutil.Error:
        return None
    for kind, beginnings in TITLES.items():
        if said.startswith(beginnings):
            return kind
    return "decoder" if "pipelines.decoder" in said else None


def raylets(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Of a living node."""
    try:
        return [child for child in psutil.Process(node.pid).children() if child.name() == "raylet"]
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def battered(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battered]:
    folder = tmp_path_factory.mktemp("battered")
    tree = recipe(sources, folder / "run")
    tree["train"]["stages"] = tree["train"]["stages"][1:]  # what comes before its training is looked at here
    tree["tokenize"] |= {"piece_seconds": 2, "decode": {"workers": 1, "custom": {"decode": 1}}}
    tree["tokenize"]["encode"] = {"workers": 2, "min_workers": 2, "custom": {"encode": 1}}
    nodes = RayNodes()
    run = Battered(write_recipe(folder / "recipe.yaml", tree), folder / "run", folder / "log", "", nodes)
    try:
        run.address = nodes.start_head()
        run.add_node("decode")
        run.add_node("encode")
        run.start_driver()
        random.seed(20)
        while run.killed.total() < sum(VICTIMS.values()):
            run.kill_one()
        run.wait_until_packed()
        yield run
    finally:
        if run.driver is not None and run.driver.poll() is None:
            run.driver.kill()
            run.driver.wait()
        nodes.stop()


def test_twenty_kills_leave_no_trace_in_the_output(battered: Battered, undisturbed: Path) -> None:
    assert battered.killed == VICTIMS
    assert battered.killed.total() == 20

    def of_data(found: dict[str, Any]) -> dict[str, Any]:
        return {name: what for name, what in found.items() if name.split("/")[1] in DATA_STAGES}

    expected = of_data(outputs(undisturbed))
    assert sum(name.endswith(".tar") for name in expected) > 5
    assert sum("/documents/" in name for name in expected) == 11
    assert of_data(outputs(battered.root)) == expected
    assert of_data(manifests(battered.root)) == of_data(manifests(undisturbed))


def test_decoders_and_encoders_land_on_the_nodes_that_are_for_them(battered: Battered) -> None:
    assert battered.placed["encoder"] == {"encode"}
    assert battered.placed["decoder"] == {"decode"}
