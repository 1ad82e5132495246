"""The command as a job: submitted to a Ray head with a second node of its own, from the repository's root."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from miniature import ROOT, text_recipe, write_recipe
from ray_nodes import BIN, RayNodes

from jobs.bench.object_store import free_ports

pytestmark = pytest.mark.slow


@dataclass(kw_only=True)
class Cluster(RayNodes):
    """A head without, and a node with, the resource `decode`; their own ports and folders."""

    dashboard: str
    metrics: tuple[str, ...]

    def get(self, path: str) -> str:
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ports = free_ports(5)
    gcs, dashboard, client, *metrics = ports
    metrics_at = tuple(f"http://127.0.0.1:{port}/metrics" for port in metrics)
    made = Cluster(dashboard=f"http://127.0.0.1:{dashboard}", metrics=metrics_at)
    try:
        made.start(
            "--head",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--metrics-export-port={metrics[0]}",
            "--dashboard-agent-listen-port=0",
            "--num-cpus=2",
            "--object-store-memory=134217728",
        )
        wait_for(lambda: len(nodes(made)) == 1)
        made.start(
            f"--address=127.0.0.1:{gcs}",
            f"--metrics-export-port={metrics[1]}",
            "--dashboard-agent-listen-port=0",
            "--num-cpus=1",
            '--resources={"decode": 2}',
            "--object-store-memory=134217728",
        )
        wait_for(lambda: len(nodes(made)) == 2)
        yield made
    finally:
        made.stop()


def wait_for(condition: object, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():  # type: ignore[operator]
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise TimeoutError


def nodes(cluster: Cluster) -> list[dict[str, object]]:
    rows = json.loads(cluster.get("/api/v0/nodes"))["data"]["result"]["result"]
    return [row for row in rows if row["state"] == "ALIVE"]


def test_a_job_runs_the_recipe_to_its_end_on_both_nodes_and_shows_its_figures(
    cluster: Cluster, sources: Path, tmp_path: Path
) -> None:
    tree = text_recipe(sources, tmp_path / "run")
    tree["tokenize"]["decode"] = {"custom": {"decode": 1}, "workers": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", tree)
    log = tmp_path / "log"
    entry = ["--working-dir", ".", "--", "python", "-m", "jobs.run", str(recipe)]
    with log.open("wb") as said:
        job = subprocess.Popen(
            [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, *entry],
            cwd=ROOT,
            env=cluster.environment(),
            stdout=said,
            stderr=said,
        )
        shown = figures_while(job, cluster)
    text = log.read_text()
    assert job.returncode == 0, text
    assert re.search(r"Job 'raysubmit_\w+' succeeded", text)
    assert f"report: {tmp_path}/run/report.html" in text
    (submitted,) = json.loads(cluster.get("/api/jobs/"))
    assert submitted["status"] == "SUCCEEDED"
    assert (tmp_path / "run" / "report.json").is_file()
    assert {"ray_ringworld_progress_done tokenize", "ray_ringworld_loss train-text"} <= shown

    (second,) = [row["node_id"] for row in nodes(cluster) if not row["is_head_node"]]
    tasks = json.loads(cluster.get("/api/v0/tasks?detail=1&limit=10000"))["data"]["result"]["result"]
    decoded = [task for task in tasks if task["name"].startswith("tokenize:")]
    assert len(decoded) == 9
    assert {task["node_id"] for task in decoded} == {second}
    assert_light(*Path(cluster.folders[0]).glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))


def assert_light(uploaded: Path) -> None:
    """What the plain command uploads: the code, and neither the history, environments, runs nor caches."""
    assert (uploaded / "jobs" / "run.py").is_file()
    assert {path.name for path in uploaded.iterdir()}.isdisjoint({".git", ".venv", "venv", "runs", ".mypy_cache"})
    assert sum(path.stat().st_size for path in uploaded.rglob("*")) < 10 * 2**20


def figures_while(job: subprocess.Popen[bytes], cluster: Cluster) -> set[str]:
    """Names and stages of Ringworld's figures at the nodes' metrics endpoints for as long as the job runs."""
    shown: set[str] = set()
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline:
        for address in cluster.metrics:
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            for line in text.splitlines():
                if match := re.match(r'(ray_ringworld_\w+){.*\bstage="([\w-]+)"', line):
                    shown.add(" ".join(match.groups()))
        time.sleep(0.5)
    return shown
