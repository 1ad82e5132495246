"""The start commands of cluster.yaml and the README's lines, run for real: two nodes and a job by a token."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from testing.miniature import ROOT, environment
from testing.ray_nodes import BIN, SMALL, RayNodes
from testing.s3_server import free_ports

pytestmark = pytest.mark.slow

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
README = (
    (ROOT / "README.md").read_text().partition("## On a cluster")[2].partition("```console\n")[2].partition("```")[0]
)
NODES = "import ray, time\nray.init()\nwhile len(ray.nodes()) < 2: time.sleep(0.2)\nprint(len(ray.nodes()), 'nodes')"
PORT = 6379


@dataclass(kw_only=True)
class Cluster(RayNodes):
    """Nodes as the cluster file starts them. home: of the user whose machines these are."""

    home: Path
    dashboard: str
    gcs: int

    def environment(self, **more: str) -> dict[str, str]:
        """Of a user's shell on a machine with the package installed."""
        return environment(HOME=str(self.home), PATH=f"{BIN}:/usr/bin:/bin", RAY_HEAD_IP="127.0.0.1", **more)

    def start_by(self, commands: list[str], *arguments: str) -> None:
        """Run the one command that starts a node, on our own ports and in the foreground."""
        (command,) = [command for command in commands if command != "ray stop"]  # which would end every Ray there is
        command = re.sub(r" --autoscaling-config=\S+", "", command).replace(str(PORT), str(self.gcs))
        self.folders.append(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))
        command = " ".join(
            [command, "--block --disable-usage-stats", f"--temp-dir={self.folders[-1]}", *arguments, *SMALL]
        )
        with open(f"{self.folders[-1]}/start.log", "wb") as log:
            self.nodes.append(subprocess.Popen(["bash", "-c", command], env=self.environment(), stdout=log, stderr=log))

    def shell(self, *lines: str) -> subprocess.CompletedProcess[str]:
        """What a user of the cluster types, as one script."""
        return subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            env=self.environment(RAY_ADDRESS=f"127.0.0.1:{self.gcs}", RAY_API_SERVER_ADDRESS=self.dashboard),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def lines(start: str) -> str:
    """The one line of the README's that starts so."""
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    return line


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    gcs, dashboard, client = free_ports(3)
    home = tmp_path_factory.mktemp("home")
    made = Cluster(home=home, dashboard=f"http://127.0.0.1:{dashboard}", gcs=gcs)
    token = made.shell(lines("ray get-auth-token"))
    assert token.returncode == 0, token.stderr
    assert (home / ".ray" / "auth_token").is_file()
    try:
        ports = (f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")
        made.start_by(CLUSTER["head_start_ray_commands"], *ports, "--num-cpus=1")
        made.wait_for_port(gcs)
        made.start_by(CLUSTER["worker_start_ray_commands"], "--num-cpus=1")
        yield made
    finally:
        made.stop()


def test_the_nodes_get_the_token_that_their_start_commands_demand() -> None:
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (CLUSTER["head_start_ray_commands"], CLUSTER["worker_start_ray_commands"]):
        assert [command.startswith("RAY_AUTH_MODE=token ray start") for command in commands] == [False, True]


@pytest.mark.faults
def test_a_job_of_somebody_with_the_token_runs_on_both_nodes(cluster: Cluster) -> None:
    submit = re.sub(r"-- .*", f'-- python -c "{NODES}"', lines("ray job submit"))
    done = cluster.shell(lines("export RAY_AUTH_MODE"), "ray status", submit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 nodes" in done.stdout
    assert re.search(r"Job 'raysubmit_\w+' succeeded", done.stdout + done.stderr)


@pytest.mark.faults
def test_somebody_without_the_token_is_refused(cluster: Cluster) -> None:
    done = cluster.shell("export RAY_AUTH_MODE=disabled", "ray status")
    assert done.returncode != 0
    assert "oken" in done.stdout + done.stderr
