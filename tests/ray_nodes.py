"""A Ray cluster of several nodes on this machine, as `ray start` makes them: each its own processes, ports and folder.

Nodes and whatever they started are ended by their saved process ids.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from miniature import environment

BIN = Path(sys.executable).parent


@dataclass
class RayNodes:
    """The first node started is the head."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex * 2)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    started: dict[int, psutil.Process] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Of whoever may use the cluster."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return environment(PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token, **more)

    def start(self, *arguments: str) -> None:
        """Start a node with these arguments of `ray start`."""
        # Ray keeps sockets there, whose paths must be short: pytest's own folders are too deep.
        self.folders.append(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--temp-dir={self.folders[-1]}"]
        with open(f"{self.folders[-1]}/start.log", "wb") as log:
            self.nodes.append(subprocess.Popen([*command, *arguments], env=self.environment(), stdout=log, stderr=log))

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
