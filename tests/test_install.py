"""`make install` takes the CPU build of torch where it finds one, and the ordinary one where it does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = next(re.finditer(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))[0]
CPU, INDEX = f"{TORCH}+cpu", "download.pytorch.org"

pytestmark = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="with an NVIDIA driver there is but one build")


def install(folder: Path, refuse: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Run the rule with a pip that notes what it is asked for, and refuses what matches the pattern at length."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    pip = folder / "pip"
    pip.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        f'if echo "$@" | grep -qE "{refuse}"; then echo "ResolutionImpossible" >&2; exit 1; fi\n'
    )
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" != venv ] || {{ mkdir -p "$3/bin"; cp {pip} "$3/bin/pip"; cp "$0" "$3/bin/python"; }}\n'
    )
    for script in (pip, python):
        script.chmod(0o755)
    done = subprocess.run(
        ["make", "install", "VENV=env", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True, check=False
    )
    asked = (folder / "asked").read_text().splitlines()
    return [line for line in asked if "torch" in line], done


def test_the_cpu_build_of_an_index_configured_comes_first(tmp_path: Path) -> None:
    (only,), done = install(tmp_path, refuse="^$")
    assert only.endswith(CPU)
    assert done.returncode == 0


def test_then_that_of_pytorchs_index(tmp_path: Path) -> None:
    (_, second), done = install(tmp_path, refuse=re.escape("+cpu"))
    assert INDEX in second
    assert second.endswith(TORCH)
    assert done.returncode == 0


def test_then_the_ordinary_build_with_a_line_for_each_step_and_no_word_of_the_resolver(tmp_path: Path) -> None:
    asked, done = install(tmp_path, refuse=f"{re.escape(CPU)}|{re.escape(INDEX)}")
    assert len(asked) == 3
    assert INDEX not in asked[-1]
    assert asked[-1].endswith(TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.startswith("torch: ")] == [
        "torch: the CPU build, from the indexes configured",
        "torch: not there; from PyTorch's CPU index",
        "torch: not there either; the ordinary build, from the indexes configured",
    ]


def test_a_machine_that_gets_none_sees_why(tmp_path: Path) -> None:
    asked, done = install(tmp_path, refuse="torch==")
    assert len(asked) == 3
    assert done.returncode != 0
    assert "ResolutionImpossible" in done.stderr
