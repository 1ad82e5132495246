"""The whole GPU script, as a user would rehearse it: every part passes on a CPU, at its smallest, in one command.

So it does where only what the script needs is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.parts import PARTS
from tests.benchmarks.gpu.absent import NEVER, environment_without

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_part_passes_in_a_rehearsal(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "jobs.cli", "bench", "gpu", "--device", "cpu", "--tiny", "--minutes", "14"]
    done = subprocess.run(
        [*command, "--json", str(report)],
        cwd=ROOT,
        env=environment_without(NEVER, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    parts = json.loads(report.read_text())["parts"]
    assert list(parts) == [part.name for part in PARTS]
    wrong = {name: entry.get("why") for name, entry in parts.items() if entry["state"] != "passed"}
    assert wrong == {}
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(entry["rows"] for entry in parts.values())
    rows = [row for entry in parts.values() for row in entry["rows"]]
    assert any(row["kind"] == "goal" and not row["met"] and row.get("profile") for row in rows), "none is explained"
