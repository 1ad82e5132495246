"""The command as a job on a cluster of two nodes, from a bucket to a bucket of a real S3 server.

Its driver is killed amid training, and the same job is submitted again. What it makes is what an undisturbed local run
makes, and no credential is in what it writes, says or calls its processes.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipelines.train.metrics.steps import read_metrics
from storage.lease import LEASE
from storage.store import Store
from testing.miniature import ROOT, ringworld, text_recipe, write_recipe
from testing.ray_nodes import BIN, RayNodes
from testing.s3_server import KEY, SECRET, ObjectStore, free_ports
from testing.tensorboard_events import shown_by_tensorboard, shown_of
from tests.pipelines.test_resume import steps

pytestmark = [pytest.mark.slow, pytest.mark.faults]


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


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise TimeoutError


def nodes(cluster: Cluster) -> list[dict[str, object]]:
    rows = json.loads(cluster.get("/api/v0/nodes"))["data"]["result"]["result"]
    return [row for row in rows if row["state"] == "ALIVE"]


@pytest.fixture(scope="module")
def options(object_store: ObjectStore) -> dict[str, Any]:
    """The recipe's storage.options, with the credentials that a careless user would write there."""
    return {"endpoint_url": object_store.endpoint, "key": KEY, "secret": SECRET}


@dataclass
class Finished:
    """A text run as two jobs, with sources and output in the bucket. killed, said: what the first job, whose driver was
    killed, and the second printed. shown: Ringworld's figures with their stages, as the nodes' metrics endpoints had
    them. commands: the command lines of all processes.
    """

    recipe: Path
    killed: str = ""
    said: str = ""
    code: int | None = None
    shown: set[str] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)

    def look(self, cluster: Cluster) -> None:
        """Keep what is shown at this moment."""
        for address in cluster.metrics:
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            for line in text.splitlines():
                if match := re.match(r'(ray_ringworld_\w+){.*\bstage="([\w-]+)"', line):
                    self.shown.add(" ".join(match.groups()))
        for node in cluster.nodes:
            for process in cluster.processes(node):
                try:
                    self.commands.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue


@pytest.fixture(scope="module")
def finished(
    cluster: Cluster,
    object_store: ObjectStore,
    options: dict[str, Any],
    sources: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    for path in [*sources.glob("acts/*"), sources / "tokenizer.json"]:
        object_store.fs.put_file(str(path), f"data/in/{path.relative_to(sources)}")
    tree = text_recipe("s3://data/in", "s3://data/run")
    tree["storage"]["options"] = options
    tree["tokenize"]["decode"] = {"custom": {"decode": 1}, "workers": 2}
    run = Finished(write_recipe(tmp_path_factory.mktemp("job") / "recipe.yaml", tree))
    stage = Store("s3://data/run/stages/train-text", options)
    run.killed, code = submit(run, cluster, until=lambda: any(name.endswith("/COMMIT") for name in stage.names()))
    assert code != 0, run.killed
    assert not any(name.endswith("/manifest.json") for name in stage.names()), "training was over before the kill"
    run.said, run.code = submit(run, cluster)
    return run


def submit(run: Finished, cluster: Cluster, until: Callable[[], bool] = lambda: False) -> tuple[str, int]:
    """Submit the recipe as a job and follow it to its end, killing its driver when `until` holds; what it printed, and
    the exit code.
    """
    log = run.recipe.with_name("log")
    entry = ["--working-dir", ".", "--", "python", "-m", "jobs.run", str(run.recipe)]
    with log.open("wb") as said:
        job = subprocess.Popen(
            [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, *entry],
            cwd=ROOT,
            env=cluster.environment(),
            stdout=said,
            stderr=said,
        )
        deadline, is_killed = time.monotonic() + 300, False
        while job.poll() is None and time.monotonic() < deadline:
            run.look(cluster)
            if not is_killed and until():
                (driver,) = [one for one in cluster.processes(cluster.nodes[0]) if is_driver(one)]
                driver.kill()
                is_killed = True
            time.sleep(0.5)
        job.kill()
    return log.read_text(), job.wait()


def is_driver(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:3] == ["-m", "jobs.run"]
    except psutil.Error:
        return False


def test_the_job_succeeds_and_tells_where_its_report_is(finished: Finished, cluster: Cluster) -> None:
    assert finished.code == 0, finished.said
    assert re.search(r"Job 'raysubmit_\w+' succeeded", finished.said)
    assert "report: s3://data/run/report.html" in finished.said
    assert sorted(job["status"] for job in json.loads(cluster.get("/api/jobs/"))) == ["FAILED", "SUCCEEDED"]


def test_what_the_killed_job_committed_is_kept_and_training_carries_on_at_the_exact_next_sequences(
    finished: Finished, options: dict[str, Any], undisturbed: Path
) -> None:
    assert "carries on at step" in finished.said
    assert re.findall(r"(\S+) {2,}done ", finished.said) == ["sources", "tokenize", "pack-text"]
    remote = Store("s3://data/run/stages/train-text", options)
    folder = remote.at(*remote.folders())
    shown = shown_by_tensorboard(folder.at("tensorboard").fetch_folder())
    assert shown == shown_of(read_metrics(folder)), "every step once, through the kill"
    found = steps(remote)
    expected = steps(Store(str(undisturbed)).at("stages", "train-text"))
    for what in ("step", "useful_pairs", "text_targets"):
        assert [step[what] for step in found] == [step[what] for step in expected]
    # The undisturbed run's model has vision ids too, so that its sums are rounded elsewhere.
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], rel=1e-5)


def test_its_figures_are_among_the_nodes_metrics(finished: Finished) -> None:
    assert {"ray_ringworld_progress_done tokenize", "ray_ringworld_loss train-text"} <= finished.shown


def test_tasks_run_on_the_node_that_has_what_they_ask_for(finished: Finished, cluster: Cluster) -> None:
    (second,) = [row["node_id"] for row in nodes(cluster) if not row["is_head_node"]]
    tasks = json.loads(cluster.get("/api/v0/tasks?detail=1&limit=10000"))["data"]["result"]["result"]
    decoded = [task for task in tasks if task["name"] == "tokenize"]
    assert len(decoded) == 9, finished.said
    assert {task["node_id"] for task in decoded} == {second}


@pytest.mark.usefixtures("finished")
def test_what_is_uploaded_is_the_code_without_history_environments_runs_or_caches(cluster: Cluster) -> None:
    uploaded, *_ = Path(cluster.folders[0]).glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (uploaded / "jobs" / "run.py").is_file()
    assert {path.name for path in uploaded.iterdir()}.isdisjoint({".git", ".venv", "venv", "runs", ".mypy_cache"})
    files = [path for path in uploaded.rglob("*") if "__pycache__" not in path.parts]  # what its running has compiled
    assert sum(path.stat().st_size for path in files) < 10 * 2**20


def test_shards_are_those_of_a_local_run_but_for_the_addresses_in_their_lineage(
    finished: Finished, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    local, remote = (
        {without_hash(name): store.open(name) for name in store.names("shards")}
        for store in (Store(str(undisturbed)).at(*PACKED), Store("s3://data/run", options).at(*PACKED))
    )
    assert len(local) > 10
    assert remote.keys() == local.keys()
    for name, file in remote.items():
        assert members(file) == members(local[name])


PACKED = ("stages", "pack-text")


def without_hash(name: str) -> str:
    """The name of a shard or sequence without the hash of what decides its partition, which addresses are part of."""
    stem, count = re.subn("-[0-9a-f]{16}-", "-", name)
    assert count == 1
    return stem


def members(file: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            name = without_hash(member.name)
            made[name] = content.read()
            if name.endswith(".json"):
                made[name] = json.loads(made[name])
                made[name]["key"] = without_hash(made[name]["key"])
                for entry in made[name]["lineage"]:
                    assert entry["provenance"].pop("url").endswith(entry["key"].split("#")[0].removeprefix("acts"))
                    assert entry["provenance"].pop("etag")
    return made


def test_everything_in_the_bucket_is_as_committed(finished: Finished, object_store: ObjectStore) -> None:
    verified = ringworld("inspect", "s3://data/run", "--verify", **object_store.environment)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_second_run_is_cached_though_the_credentials_come_from_elsewhere(
    finished: Finished, object_store: ObjectStore
) -> None:
    endpoint = f"storage.options={{endpoint_url: {object_store.endpoint}}}"
    again = ringworld("run", finished.recipe, "--set", endpoint, **object_store.environment)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(" done ") == 6


def test_no_credential_is_written_anywhere(finished: Finished, options: dict[str, Any]) -> None:
    store = Store("s3://data/run", options)
    names = store.names()
    assert {"report.html", "report.json"} < set(names)
    assert LEASE not in names
    assert len([name for name in names if name.endswith("manifest.json")]) >= 6
    for name in names:
        with store.open(name) as file:
            content = file.read()
        if name.endswith(".parquet"):  # whose columns are compressed
            table = pq.read_table(io.BytesIO(content))
            content += f"{table.schema} {table.to_pydict()}".encode()
        assert SECRET.encode() not in content, name
        assert KEY.encode() not in content, name


def test_no_credential_is_said_in_a_log_or_in_a_process_list(finished: Finished, cluster: Cluster) -> None:
    assert any("raylet" in command for command in finished.commands)
    assert any("ray::" in command for command in finished.commands)
    logs = [path for folder in cluster.folders for path in Path(folder).glob("session_2*/logs/**/*") if path.is_file()]
    assert any("job-driver" in path.name for path in logs)
    for said in (
        finished.killed,
        finished.said,
        *finished.commands,
        *(path.read_text(errors="replace") for path in logs),
    ):
        assert SECRET not in said
        assert KEY not in said
