"""A Ray cluster of several nodes on this machine, as `ray start` makes them: each its own processes, ports and folder.

Nodes and whatever they started are ended by their saved process ids.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from testing.miniature import environment
from testing.s3_server import free_ports

BIN = Path(sys.executable).parent
PATIENCE = 120.0
SMALL = ("--dashboard-agent-listen-port=0", "--object-store-memory=100000000")


@dataclass
class RayNodes:
    """The first node started is the head. bin: of the environment whose Ray they run."""

    bin: Path = BIN
    token: str = field(default_factory=lambda: uuid.uuid4().hex * 2)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    started: dict[int, psutil.Process] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a user with the cluster's token."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return environment(PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token, **more)

    def start(self, *arguments: str, **env: str) -> None:
        """Start a node with these arguments of `ray start`."""
        # Ray keeps sockets there, whose paths must be short: pytest's own folders are too deep.
        self.folders.append(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))
        command = [str(self.bin / "ray"), "start", "--block", "--disable-usage-stats", f"--temp-dir={self.folders[-1]}"]
        with open(f"{self.folders[-1]}/start.log", "wb") as log:
            self.nodes.append(
                subprocess.Popen([*command, *arguments], env=self.environment(**env), stdout=log, stderr=log)
            )

    def start_head(self) -> str:
        """Start the head, with one CPU, and wait until other nodes can join it; its address."""
        gcs, dashboard, client = free_ports(3)
        ports = (f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")
        self.start("--head", *ports, "--num-cpus=1", *SMALL)
        self.wait_for_port(gcs)
        return f"127.0.0.1:{gcs}"

    def wait_for_port(self, port: int) -> None:
        """Wait until the node started last answers at a port."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert self.nodes[-1].poll() is None, Path(self.folders[-1], "start.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def join(self, address: str, cpus: int, resource: str, amount: int, **env: str) -> subprocess.Popen[bytes]:
        """Start a node that offers so much of a custom resource; the node."""
        self.start(
            f"--address={address}", f"--num-cpus={cpus}", f'--resources={{"{resource}": {amount}}}', *SMALL, **env
        )
        return self.nodes[-1]

    def processes(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """All living processes of a node; they are remembered, to be ended."""
        try:
            itself = psutil.Process(node.pid)
            found = [itself, *itself.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.started |= {process.pid: process for process in found}
        return found

    def stop(self) -> None:
        """End the nodes, the head last, and all that they started."""
        for node in self.nodes:
            self.processes(node)
        for node in reversed(self.nodes):
            node.terminate()
        _, left = psutil.wait_procs(list(self.started.values()), timeout=8)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=8)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
