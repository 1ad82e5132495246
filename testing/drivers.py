"""Drivers of `ringworld run` as their users start them: real processes, watched while they run."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from testing.miniature import environment

MARK = "RINGWORLD_TEST_DRIVER"
PATIENCE = 300.0


@dataclass
class Driver:
    """A run under way. log: what it says, in a file, since nobody reads it meanwhile. commands: the command lines seen
    of it and of all processes that it started, Ray's too.
    """

    log: Path
    process: subprocess.Popen[bytes]
    mark: str
    commands: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, recipe: Path, name: str, **env: str) -> Driver:
        """Start `ringworld run` of a recipe in a process of its own, its log beside the recipe."""
        log, mark = recipe.with_name(f"{name}.log"), uuid.uuid4().hex
        with log.open("wb") as said:
            # In the background of a script SIGINT is ignored, here and in what is started here.
            command = ["env", "--default-signal", sys.executable, "-m", "jobs.cli", "run", str(recipe)]
            return cls(
                log, subprocess.Popen(command, env=environment(**env, **{MARK: mark}), stdout=said, stderr=said), mark
            )

    def until(self, when: Callable[[], bool], watch: bool = True) -> None:
        """Wait for a moment that comes before its end. watch: look at its processes too, which takes longer than some
        moments last.
        """
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            if watch:
                self.watch()
            time.sleep(0.1 if watch else 0.01)

    def end(self) -> tuple[int, str]:
        """Wait for its end: its exit code and its last line."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                pytest.fail(self.log.read_text())
            self.watch()
            time.sleep(0.3)
        return self.process.returncode, self.log.read_text().strip().splitlines()[-1]

    def watch(self) -> None:
        """Keep the command lines of this moment."""
        self.commands |= set(self.living())

    def living(self) -> list[str]:
        """Command lines of the driver and all that it started, Ray's processes too, as far as they live."""
        return [command for _, command in self.processes()]

    def processes(self) -> list[tuple[psutil.Process, str]]:
        """The same with their processes."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process, " ".join(process.cmdline())))
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self.process.kill()
        self.process.wait()
